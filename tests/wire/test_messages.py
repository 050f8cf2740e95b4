"""Tensors as a message: what comes back, and what is refused before anything is read."""

from __future__ import annotations

import json
import math
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlora.wire.tensors import MessageError, decode_tensors, encode, held, message_num_bytes
from kit.mutations import cuts, edits, mutated

# Tensors

EXPECTED = {
    "b.x": (torch.float32, (3, 4)),
    "a": (torch.float32, (5,)),
    "ü": (torch.float32, (2, 1, 2)),
}
TENSORS = {
    name: torch.arange(math.prod(shape), dtype=dtype).view(shape) - 2
    for name, (dtype, shape) in EXPECTED.items()
}
MESSAGE = encode(TENSORS, torch.float32)


def header_of(message: bytes) -> dict[str, Any]:
    size = int.from_bytes(message[:8], "little")
    header: dict[str, Any] = json.loads(message[8 : 8 + size])
    return header


def with_header(header: Any, message: bytes = MESSAGE) -> bytes:
    """The same message with another header, padded to the same length where that is possible."""
    size = int.from_bytes(message[:8], "little")
    text = (
        json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if not isinstance(header, bytes)
        else header
    )
    return len(text.ljust(size)).to_bytes(8, "little") + text.ljust(size) + message[8 + size :]


@given(
    st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1,
        max_size=20)
                    .filter(lambda name: name != "__metadata__"),
                    st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)  # fmt: skip
def test_a_message_comes_back_and_has_the_foretold_length(
    shapes: dict[str, list[int]], wire: torch.dtype
) -> None:
    sent = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for name, shape in shapes.items()
    }
    expected = {name: (wire, tuple(shape)) for name, shape in shapes.items()}
    message = encode(sent, wire)
    assert len(message) == message_num_bytes(expected)
    got = decode_tensors(message, expected)
    assert list(got) == list(sent)
    assert all(torch.equal(got[name], sent[name].to(wire)) for name in sent)


def test_mixed_dtypes_too() -> None:
    from safetensors.torch import save

    sent = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(2),
        "c": torch.ones(1, dtype=torch.float64),
    }
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sent.items()}
    assert len(save(sent)) == message_num_bytes(expected)
    assert decode_tensors(save(sent), expected).keys() == sent.keys()


def test_a_file_is_mapped(tmp_path: Path) -> None:
    """Every byte is looked at, and none copied."""
    shape = (1024, 4096)  # 16 MiB
    path = tmp_path / "message"
    path.write_bytes(encode({"a": torch.ones(shape)}, torch.float32))
    tracemalloc.start()
    got = decode_tensors(path, {"a": (torch.float32, shape)})
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    got["a"] += 1  # our own copy of the page, not the file
    assert torch.equal(decode_tensors(path, {"a": (torch.float32, shape)})["a"], torch.ones(shape))


def changed(name: str, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header | {name: header[name] | fields}


BAD_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (changed("b.x", shape=[4, 3]), r"b.x: shape \[4, 3\]; it should be \[3, 4\]"),
    "shape of another length": (changed("b.x", shape=[12]), "b.x: shape"),
    "shape of floats": (changed("b.x", shape=[3.0, 4.0]), "b.x: shape"),
    "shape of booleans": (changed("ü", shape=[2, True, 2]), "ü: shape"),
    "dtype": (changed("a", dtype="I32"), 'a: dtype "I32"; it should be F32'),
    "dtype of no kind": (changed("a", dtype=[]), "a: dtype"),
    "offsets swapped": (changed("a", data_offsets=[20, 0]), "a: data_offsets"),
    "offsets overlap": (changed("b.x", data_offsets=[0, 48]), "begin"),
    "offsets beyond": (changed("a", data_offsets=[10**30, 10**30 + 20]), "begin"),
    "offsets negative": (changed("a", data_offsets=[-20, 0]), "begin"),
    "one offset": (changed("a", data_offsets=[0]), "a: data_offsets"),
    "more keys": (lambda header: header | {"a": {**header["a"], "x": 1}}, "a: its header"),
    "no entry": (lambda header: header | {"a": 1}, "a: its header"),
    "another name": (
        lambda header: {("c" if name == "a" else name): entry for name, entry in header.items()},
        '"a", "c"',
    ),
    "a name of two lines": (lambda header: header | {"x\ny": 1}, r'"x\\ny"'),
    "one missing": (
        lambda header: {name: entry for name, entry in header.items() if name != "a"},
        "exactly the expected",
    ),
    "a list": (lambda header: [], "exactly the expected"),
    "no JSON": (lambda header: b"{", "not JSON"),
    "not UTF-8": (lambda header: b"\xff", "not JSON"),
    "deep": (lambda header: b"[" * 150, "not JSON"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_another_header_is_refused_by_name(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, words = BAD_HEADERS[case]
    message = with_header(change(header_of(MESSAGE)))
    if len(message) > len(MESSAGE):
        words = "bytes; it should"
    monkeypatch.setattr(torch, "frombuffer", None)  # no tensor is made before the header is right
    with pytest.raises(MessageError, match=words) as caught:
        decode_tensors(message, EXPECTED)
    assert "\n" not in str(caught.value)


def test_a_name_twice() -> None:
    message = with_header(b'{"a":1,"a":2}')
    with pytest.raises(MessageError, match="twice"):
        decode_tensors(message, EXPECTED)


def test_nesting_and_numbers_without_end() -> None:
    """In a header that a large adapter would have: neither the stack nor the clock suffers."""
    expected = {f"{number:0600}": (torch.float32, (1,)) for number in range(400)}
    message = encode({name: torch.ones(1) for name in expected}, torch.float32)
    size = int.from_bytes(message[:8], "little")
    for header in (b"[" * size, b'{"a":' * (size // 5), b"9" * size):
        with pytest.raises(MessageError, match="not JSON"):
            decode_tensors(with_header(header, message), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(value: float, wire: torch.dtype) -> None:
    tensors: dict[str, Tensor] = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    tensors["b"][1, 0] = value
    expected = {name: (wire, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with pytest.raises(MessageError, match="b holds a value that is not finite"):
        decode_tensors(encode(tensors, wire), expected)


def test_a_length_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "message"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(MessageError, match="has 1073741824 bytes; it should have"):
        decode_tensors(path, EXPECTED)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("announced", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(announced: int) -> None:
    with pytest.raises(MessageError, match="announces"):
        decode_tensors(struct.pack("<Q", announced) + MESSAGE[8:], EXPECTED)


def test_a_pickle_is_not_read() -> None:
    data = pickle.dumps(torch.ones(3)).ljust(len(MESSAGE), b".")
    with pytest.raises(MessageError, match="announces"):
        decode_tensors(data[: len(MESSAGE)], EXPECTED)


@given(
    st.builds(lambda e: mutated(MESSAGE, e, None), edits)
    | st.binary(min_size=len(MESSAGE), max_size=len(MESSAGE))
)
def test_anything_is_a_message_or_a_message_error(data: bytes) -> None:
    try:
        got = decode_tensors(data, EXPECTED)
    except MessageError:
        return
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in got.items()} == EXPECTED
    assert all(tensor.isfinite().all() for tensor in got.values())


# Messages that may leave tensors out

PART = encode({"a": TENSORS["a"], "ü": TENSORS["ü"]}, torch.float32)


def decoded(data: bytes) -> dict[str, Tensor]:
    return decode_tensors(data, held(data, EXPECTED))


def test_a_part_of_the_known_tensors_is_a_message(tmp_path: Path) -> None:
    path = tmp_path / "message"
    path.write_bytes(PART)
    for got in (decoded(PART), decode_tensors(path, held(path, EXPECTED))):
        assert got.keys() == {"a", "ü"} and all(
            torch.equal(tensor, TENSORS[name]) for name, tensor in got.items()
        )
    assert decoded(MESSAGE).keys() == EXPECTED.keys()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "announces 0 bytes; it should be at most"),
        (PART[:40], "announces"),
        (
            struct.pack("<Q", 2**63) + PART[8:],
            "announces 9223372036854775808 bytes; it should be at most",
        ),
        (with_header({}, PART), "no names"),
        (with_header([], PART), "no names"),
        (with_header(b"{", PART), "not JSON"),
        (with_header(b'{"a":1,"a":2}', PART), "twice"),
        (encode({"a": TENSORS["a"], "c": TENSORS["a"] + 1}, torch.float32), 'known tensors: "c"'),
        (encode({"a": TENSORS["a"][:4]}, torch.float32), "has .* bytes; it should have"),
        (encode({"a": TENSORS["a"]}, torch.bfloat16), "has .* bytes; it should have"),
        (encode({"a": TENSORS["a"] / 0}, torch.float32), "not finite"),
        (PART + b"0", "has .* bytes; it should have"),
        (MESSAGE[:8] + PART[8:], "not JSON|known|announces|has"),
    ],
)
def test_what_is_no_part_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(MessageError, match=words) as caught:
        decoded(data)
    assert "\n" not in str(caught.value)


@given(st.builds(lambda e, c: mutated(PART, e, c), edits, cuts) | st.binary(max_size=len(MESSAGE)))
def test_anything_is_a_part_or_a_message_error(data: bytes) -> None:
    try:
        got = decoded(data)
    except MessageError:
        return
    assert (
        got
        and {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in got.items()}.items()
        <= EXPECTED.items()
    )


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(EXPECTED)), json_values, max_size=3))
def test_any_json_is_a_header_or_a_message_error(entries: dict[str, Any]) -> None:
    message = with_header(header_of(MESSAGE) | entries)
    try:
        decode_tensors(message, EXPECTED)
    except MessageError as error:
        assert "\n" not in str(error)
