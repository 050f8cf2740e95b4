"""The frames of the split conversation as bytes: they come back, and int8 is as near as it
says.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from dlora.wire.frame import FrameError
from dlora.wire.split import split_pb2 as pb
from dlora.wire.split.codec import decode_split, encode_split, split_num_bytes
from dlora.wire.split.frames import WIRES, HandOff, SplitFrame, Values, Wire
from kit.split_frames import each_wire, frames, plain, tensor_of, wires


@given(frames, wires)
def test_a_frame_comes_back(frame: SplitFrame, wire: Wire) -> None:
    data = encode_split(frame, wire)
    assert len(data) == split_num_bytes(frame, wire)
    got = decode_split(data, wire)
    assert plain(got) == plain(frame)
    sent, came = tensor_of(frame), tensor_of(got)
    if sent is None or came is None:
        return
    assert came.dtype is torch.float32 and came.is_contiguous()
    if wire == "float32" or isinstance(frame, HandOff):
        assert torch.equal(came, sent)
    elif wire == "bfloat16":
        assert torch.equal(came, sent.to(torch.bfloat16).float())
    else:
        largest = sent.abs().amax(1, keepdim=True)
        bound = 0.5 * (1 + 1e-5) * largest / 127 + 1e-43  # below 1e-38 a scale itself is inexact
        assert ((came - sent).abs() <= bound).all()
        assert not came[largest[:, 0] == 0].any()


@given(frames, wires)
def test_any_protobuf_reader_reads_a_frame(frame: SplitFrame, wire: Wire) -> None:
    data = encode_split(frame, wire)
    message = pb.Frame.FromString(data)
    assert message.WhichOneof("kind") == type(frame).__name__.lower()
    assert message.SerializeToString() == data


def test_int8_is_per_row() -> None:
    """A row of large values costs its neighbours no precision."""
    sent = torch.tensor([[1000.0, 1.0], [0.02, 0.01], [0.0, 0.0]])
    got = tensor_of(decode_split(encode_split(Values("input", 0, 0, 0, sent), "int8"), "int8"))
    assert got is not None
    assert torch.allclose(got[1], sent[1], atol=0.02 / 254)
    assert got[0, 1] == 0 and not got[2].any()


@each_wire
def test_the_length_is_known_without_the_numbers(wire: Wire) -> None:
    for rows, width in [(1, 1), (1, 31), (1, 32), (3, 4096), (300, 5000)]:
        values = Values("update", 7, 300, 2, torch.zeros(rows, width))
        meta = Values("update", 7, 300, 2, torch.empty(rows, width, device="meta"))
        assert split_num_bytes(meta, wire) == len(encode_split(values, wire))


@each_wire
def test_what_is_decoded_is_its_own(wire: Wire) -> None:
    data = encode_split(Values("hidden", 0, 0, 0, torch.ones(2, 3)), wire)
    before = bytes(bytearray(data))
    one, two = tensor_of(decode_split(data, wire)), tensor_of(decode_split(data, wire))
    assert one is not None and two is not None
    one.zero_()
    assert torch.equal(two, torch.ones(2, 3)) and data == before


def test_a_tensor_of_another_dtype_or_with_a_gradient_is_sent() -> None:
    for tensor in (
        torch.ones(2, 2, dtype=torch.float16),
        torch.ones(2, 2, requires_grad=True),
        torch.ones(4, 4)[::2, ::2],
    ):
        for wire in WIRES:
            got = tensor_of(
                decode_split(encode_split(Values("update", 0, 0, 0, tensor), wire), wire)
            )
            assert got is not None and got.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@each_wire
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(wire: Wire, value: float) -> None:
    tensor = torch.ones(3, 4)
    tensor[1, 2] = value
    with pytest.raises(FrameError, match="Values frame: a value that is not finite"):
        encode_split(Values("update", 0, 0, 0, tensor), wire)
    data = bytearray(encode_split(Values("update", 0, 0, 0, torch.ones(3, 4)), wire))
    bits = torch.tensor([value], dtype=torch.bfloat16 if wire == "bfloat16" else torch.float32)
    raw = bits.view(torch.uint8).numpy().tobytes()
    payload_bytes = {"float32": 48, "bfloat16": 24, "int8": 24}[wire]
    place = len(data) - payload_bytes + len(raw)  # the second value, or the second row's scale
    data[place : place + len(raw)] = raw
    with pytest.raises(FrameError, match="not finite"):
        decode_split(bytes(data), wire)
