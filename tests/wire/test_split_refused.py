"""Bytes and frames that no half of a split sends: refused by name, before memory is taken."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlora.wire.frame import MAX_MANIFEST_BYTES, FrameError
from dlora.wire.split import split_pb2 as pb
from dlora.wire.split.codec import MAX_FACTORS, MAX_SIDE, MAX_UNITS, decode_split, encode_split
from dlora.wire.split.frames import Begin, Drop, Failed, HandOff, Refused, SplitFrame, Values, Wire
from kit.split_frames import frames, plain, tensor_of, wires


def begin(**changes: Any) -> dict[str, Any]:
    """The fields of a good part of two rows, three tokens, width 1, with changes."""
    fields: dict[str, Any] = {"rows": 2, "columns": 2, "mask": b"\xd0", "width": 1}
    return {"begin": pb.Begin(**fields | changes)}


def values(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"what": "input", "rows": 3, "width": 1}
    return {"values": pb.Values(**fields | changes)}


BAD_FRAMES: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({}, "no frame"),
    "a tensor only": ({"payload": bytes(12)}, "no known kind"),
    "manifest": (
        {"open": pb.Open(manifest="é" * (MAX_MANIFEST_BYTES // 2 + 1))},
        "manifest has 1048578 bytes",
    ),
    "reason": ({"refused": pb.Refused(reason="x" * 2001)}, "reason has 2001 bytes"),
    "text": ({"failed": pb.Failed(why="memory", text="x" * 2001)}, "text has 2001 bytes"),
    "two lines": ({"failed": pb.Failed(why="memory", text="x\ny")}, "several lines"),
    "escape": ({"refused": pb.Refused(reason="\x1b[2J")}, "not for printing"),
    "why": ({"failed": pb.Failed(why="because\n")}, r"why 'because\n' is none of memory, tokens"),
    "what": ({**values(what="adapter"), "payload": bytes(12)}, "what 'adapter' is none of input"),
    "no what": ({**values(what=""), "payload": bytes(12)}, "what '' is none of"),
    "call": ({"drop": pb.Drop(call=2**53)}, "call 9007199254740992 is not between 0 and"),
    "part": ({"done": pb.Done(part=2**64 - 1)}, "part 18446744073709551615"),
    "unit": ({**values(unit=2**53), "payload": bytes(12)}, "unit"),
    "tokens": ({"opened": pb.Opened(max_tokens=2**60)}, "max_tokens"),
    "no rows": ({**values(rows=0)}, "rows 0 is not between 1 and 1048576"),
    "no width": ({**values(width=0)}, "width 0"),
    "many rows": ({**values(rows=MAX_SIDE + 1)}, "rows 1048577"),
    "wide": ({**values(width=2**63)}, "width 9223372036854775808"),
    "a lie about rows": (
        {**values(rows=MAX_SIDE, width=MAX_SIDE), "payload": bytes(12)},
        "12 bytes of a tensor",
    ),
    "no payload": (values(), "0 bytes of a tensor"),
    "too long": ({**values(), "payload": bytes(13)}, "13 bytes of a tensor"),
    "too short": ({**values(), "payload": bytes(11)}, "11 bytes of a tensor"),
    "a tensor where none is": ({"drop": pb.Drop(call=1), "payload": bytes(12)}, "it has none"),
    "rows of none": ({**begin(rows=0), "payload": bytes(12)}, "rows 0"),
    "padded area": (
        {**begin(rows=MAX_SIDE, columns=2), "payload": bytes(12)},
        "at most 1048576 tokens",
    ),
    "long mask": (
        {**begin(mask=b"\xd0\x00"), "payload": bytes(12)},
        "mask has 2 bytes; 4 bits take 1",
    ),
    "no mask": ({**begin(mask=b""), "payload": bytes(12)}, "mask has 0 bytes"),
    "mask padding": (
        {**begin(mask=b"\xd1"), "payload": bytes(12)},
        "mask has bits set beyond its 4",
    ),
    "empty mask": ({**begin(mask=b"\x00"), "payload": b""}, "no tokens"),
    "more tokens": ({**begin(mask=b"\xf0"), "payload": bytes(12)}, "(4, 1) in float32 takes 16"),
    "long needed": ({**begin(needed=b"\x80\x00"), "payload": bytes(12)}, "needed has 2 bytes"),
    "needed padding": (
        {**begin(needed=b"\x10"), "payload": bytes(12)},
        "needed has bits set beyond its 3",
    ),
    "types": (
        {**begin(token_types=b"\x00\x00"), "payload": bytes(12)},
        "2 token_types for 3 tokens",
    ),
    "positions": (
        {**begin(positions=[0, 1, 2, 3]), "payload": bytes(12)},
        "4 positions for 3 tokens",
    ),
    "packed without positions": (
        {**begin(packed=True, mask=b"\xf0"), "payload": bytes(16)},
        "packed texts without a position",
    ),
    "packed with padding": (
        {**begin(packed=True, positions=[0, 1, 0]), "payload": bytes(12)},
        "or with padding",
    ),
    "far position": (
        {**begin(positions=[0, 2**31, 2]), "payload": bytes(12)},
        "positions 2147483648",
    ),
    "units": ({**begin(units=[0] * (MAX_UNITS + 1)), "payload": bytes(12)}, "65537 units"),
    "version": (
        {"handoff": pb.HandOff(version=1, width=3), "payload": bytes(12)},
        "version 1 is not between 2 and",
    ),
    "many factors": ({"handoff": pb.HandOff(version=2, width=MAX_FACTORS + 1)}, "width 16777217"),
    "no factors": (
        {"handoff": pb.HandOff(version=2, width=4), "payload": bytes(12)},
        "(1, 4) in float32 takes 16",
    ),
    "seed": ({**begin(seed=2**63), "payload": bytes(12)}, "seed 9223372036854775808"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_what_no_half_sends_is_no_frame(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, words = BAD_FRAMES[case]
    data = pb.Frame(**fields).SerializeToString()
    monkeypatch.setattr(torch, "frombuffer", None)  # no tensor is made of it
    with pytest.raises(FrameError) as caught:
        decode_split(data, "float32")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


GOOD = encode_split(Values("input", 1, 0, 2, torch.ones(3, 1)), "float32")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no frame"),
        (b"\xff" * 20, "no frame"),
        (GOOD[:-1], "cut off"),
        (GOOD + b"\x00", "cut off"),
        (GOOD + GOOD, "cut off"),
        (pb.Frame(drop=pb.Drop(call=1)).SerializeToString() * 2, "unknown fields"),
        (
            pb.Frame(payload=bytes(12)).SerializeToString() + GOOD[:20],
            "no known kind|no frame|unknown|cut off",
        ),
        (b"\x42\x04\x08\x01\x10\x01", "unknown fields"),  # field 2 of a drop
        (b"\x52\x02\x08\x01", "no known kind"),  # field 10 of the frame
        (b"\x1a\x03\x0a\x01\xff", "no frame"),  # a reason that is not UTF-8
        (b"\x22\xff\xff\xff\xff\x0f", "a head of"),
        (b"\x22\xff\xff\xff\xff\xff\x01", "no frame"),
        (b"\x22" + bytes([0x80, 0x80, 0x80, 5]) + bytes(10 << 20), "at most 8388608 are allowed"),
    ],
    ids=range(13),
)
def test_bytes_that_are_no_frame(data: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        decode_split(data, "float32")


def test_a_tensor_is_refused_before_memory_is_taken() -> None:
    data = pb.Frame(
        values=pb.Values(what="input", rows=MAX_SIDE, width=MAX_SIDE), payload=bytes(16 << 20)
    ).SerializeToString()
    tracemalloc.start()
    with pytest.raises(FrameError, match="16777216 bytes of a tensor"):
        decode_split(data, "bfloat16")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_another_wire_is_another_length() -> None:
    data = encode_split(Values("input", 0, 0, 0, torch.ones(4, 8)), "bfloat16")
    for wire in ("float32", "int8"):
        with pytest.raises(FrameError, match="64 bytes of a tensor"):
            decode_split(data, wire)


def test_we_do_not_send_what_we_would_refuse() -> None:
    good = Begin(0, 0, 2, 2, b"\xd0", b"", True, None, b"", (), (), torch.ones(3, 1))
    encode_split(good, "float32")
    for frame in (
        Drop(-1),
        Drop(2**53),
        Failed(0, 0, "tired", "x"),  # type: ignore[arg-type]
        Values("inputs", 0, 0, 0, torch.ones(1, 1)),  # type: ignore[arg-type]
        Values("input", 0, 0, 0, torch.ones(3)),
        Values("input", 0, 0, 0, torch.ones(0, 3)),
        Values("input", 0, 0, 0, torch.ones(1, 1, dtype=torch.int64)),
        Begin(**vars(good) | {"embedded": torch.ones(4, 1)}),
        Begin(**vars(good) | {"positions": (0, 1, -1)}),
        Begin(**vars(good) | {"units": (0, 2**53)}),
        Begin(**vars(good) | {"units": (0,) * (MAX_UNITS + 1)}),
        Begin(**vars(good) | {"positions": (0, 1, 0), "packed": True}),
        HandOff(0, 1, torch.ones(1, 4)),
        HandOff(0, 2, torch.ones(2, 4)),
    ):
        with pytest.raises(FrameError):
            encode_split(frame, "float32")


@given(st.text(st.characters(), max_size=3000))
def test_any_text_can_be_told(text: str) -> None:
    got = decode_split(encode_split(Failed(1, 2, "broken", text), "float32"), "float32")
    assert isinstance(got, Failed) and got.text.isprintable()
    if text.isprintable() and len(text.encode()) <= 2000:
        assert got.text == text


def test_a_text_is_cut_between_letters() -> None:
    got = decode_split(encode_split(Refused("x" + "é" * 1500 + "\n"), "float32"), "float32")
    assert got == Refused("x" + "é" * 999)


edits = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8)


@given(frames, wires, wires, edits, st.none() | st.integers(0, 400))
def test_anything_is_a_frame_or_a_frame_error(
    frame: SplitFrame, written: Wire, read: Wire, edits: list[tuple[int, int]], cut: int | None
) -> None:
    changed = bytearray(encode_split(frame, written))
    for place, byte in edits:
        changed[place % len(changed)] = byte
    try:
        got = decode_split(bytes(changed[:cut]), read)
    except FrameError as error:
        assert "\n" not in str(error)
        return
    tensor = tensor_of(got)
    assert tensor is None or tensor.isfinite().all()
    if read != "int8" or isinstance(got, HandOff):
        again = decode_split(encode_split(got, read), read)
        assert plain(again) == plain(got)
