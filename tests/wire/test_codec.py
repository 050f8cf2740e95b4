"""Bytes from outside: what is not exactly a frame of peers is refused in one line, in bounded
memory.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlora.wire.frame import MAX_MANIFEST_BYTES, FrameError
from dlora.wire.peer import peer_pb2
from dlora.wire.peer.codec import MAX_FRAME_BYTES, decode_frame, encode_frame
from dlora.wire.peer.frames import (
    MAX_CHUNK_BYTES,
    Chunk,
    Decided,
    Frame,
    Have,
    Hello,
    Offer,
    Shown,
    Status,
    Want,
)
from dlora.wire.tensors import encode
from kit.mutations import cuts, edits, mutated

numbers = st.integers(0, 2**53 - 1)
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=64)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
signatures = st.just(b"") | st.binary(min_size=64, max_size=64)
frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(
        Hello, hashes, st.text(st.characters(codec="utf-8")), numbers, hashes, numbers, numbers
    ),
    st.builds(Status, numbers),
    st.builds(Offer, names, numbers, hashes),
    st.builds(Want, names, numbers),
    st.builds(Chunk, names, numbers, st.binary(min_size=1)),
    st.builds(Have, numbers, signatures),
    st.builds(Decided, numbers, st.booleans(), signatures),
    st.builds(Shown, numbers, hashes, hashes, hashes, signatures),
)


@given(frames)
def test_a_frame_comes_back(frame: Frame) -> None:
    assert decode_frame(encode_frame(frame)) == frame


@pytest.mark.parametrize(
    "frame",
    [
        Chunk("a" * 64, 2**53 - 1, bytes(MAX_CHUNK_BYTES)),
        Hello("a" * 64, "é" * (MAX_MANIFEST_BYTES // 2), 2**53 - 1, "b" * 64, 2**53 - 1, 2**53 - 1),
        Offer("a", 0, "0" * 64),
    ],
    ids=["chunk", "hello", "offer"],
)
def test_the_largest_frame_fits(frame: Frame) -> None:
    data = encode_frame(frame)
    assert len(data) <= MAX_FRAME_BYTES
    assert decode_frame(data) == frame


BAD_FRAMES: dict[str, tuple[dict[str, Any], str]] = {
    "no kind": ({}, "no known kind"),
    "name too long": ({"want": peer_pb2.Want(name="a" * 65)}, "message name"),
    "no name": ({"want": peer_pb2.Want()}, "message name"),
    "a path": ({"want": peer_pb2.Want(name="../key")}, "message name"),
    "a name and a line": ({"want": peer_pb2.Want(name="a\n")}, "message name"),
    "capital hash": ({"offer": peer_pb2.Offer(name="a", sha256="A" * 64)}, "sha256"),
    "short hash": ({"hello": peer_pb2.Hello(manifest_hash="a" * 63)}, "manifest_hash"),
    "short signature": (
        {"have": peer_pb2.Have(round=1, signature=bytes(63))},
        "a signature of 63 bytes",
    ),
    "long signature": (
        {"decided": peer_pb2.Decided(round=1, signature=bytes(65))},
        "a signature of 65 bytes",
    ),
    "hash of another length": (
        {"shown": peer_pb2.Shown(round=1, ledger="a" * 64, own="a" * 65)},
        "own",
    ),
    "no ledger": ({"hello": peer_pb2.Hello(manifest_hash="a" * 64)}, "ledger"),
    "round": ({"have": peer_pb2.Have(round=2**53)}, "round 9007199254740992"),
    "length": (
        {"offer": peer_pb2.Offer(name="a", sha256="a" * 64, num_bytes=2**64 - 1)},
        "num_bytes",
    ),
    "offset": ({"chunk": peer_pb2.Chunk(name="a", offset=2**63, data=b"x")}, "offset"),
    "no data": ({"chunk": peer_pb2.Chunk(name="a")}, "0 bytes of data"),
    "too much data": (
        {"chunk": peer_pb2.Chunk(name="a", data=bytes(MAX_CHUNK_BYTES + 1))},
        "bytes of data",
    ),
    "manifest": (
        {
            "hello": peer_pb2.Hello(
                manifest_hash="a" * 64, manifest="é" * (MAX_MANIFEST_BYTES // 2 + 1)
            )
        },
        "manifest",
    ),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_what_no_peer_sends_is_no_frame(case: str) -> None:
    fields, words = BAD_FRAMES[case]
    with pytest.raises(FrameError, match=words) as caught:
        decode_frame(peer_pb2.Frame(**fields).SerializeToString())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no known kind"),
        (b"\xff" * 20, "no frame"),
        (bytes(MAX_FRAME_BYTES + 1), "at most"),
        (encode_frame(Status(1)) + b"\x40\x01", "unknown fields"),  # field 8 of the frame
        (b"\x12\x04\x08\x01\x10\x01", "unknown fields"),  # field 2 of a status
        (b"\x22\x03\x0a\x01\xff", "no frame"),  # a name that is not UTF-8
        (pickle.dumps(Status(1)), "frame"),
    ],
)
def test_bytes_that_are_no_frame(data: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        decode_frame(data)


def test_we_do_not_send_what_we_would_refuse() -> None:
    for frame in (Status(-1), Status(2**53), Want("A", 0), Chunk("a", 0, b""), Offer("a", 1, "x")):
        with pytest.raises(FrameError):
            encode_frame(frame)


@given(
    st.binary(max_size=300)
    | st.builds(lambda f, e, c: mutated(encode_frame(f), e, c), frames, edits, cuts)
)
def test_anything_is_a_frame_or_a_frame_error(data: bytes) -> None:
    try:
        frame = decode_frame(data)
    except FrameError:
        return
    assert decode_frame(encode_frame(frame)) == frame


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_minutes_of_fuzzing_find_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has wheels for Linux only")
    told = (
        Hello("0" * 64, "{}", 1, "1" * 64),
        Offer("sum", 9, "a" * 64),
        Chunk("sum", 0, b"xyz"),
        Have(2, bytes(64)),
    )
    seeds = [encode_frame(frame) for frame in told]
    seeds.append(
        encode(
            {"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(3, 2), "bias": torch.ones(4)},
            torch.float32,
        )
    )
    for number, seed in enumerate(seeds):
        (tmp_path / str(number)).write_bytes(seed)
    fuzzer = Path(__file__).with_name("fuzz_wire.py")
    options = ["-max_total_time=120", "-print_final_stats=1", f"-artifact_prefix={tmp_path}/"]
    # Through a shell that forks: a process that is started directly begins with the peak memory of
    # this one, and has a limit.
    command = [
        "sh",
        "-c",
        '"$@"; exit $?',
        "sh",
        sys.executable,
        str(fuzzer),
        *options,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print([line for line in done.stderr.splitlines() if line.startswith("stat::")])
