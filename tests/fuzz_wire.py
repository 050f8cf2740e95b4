"""Fuzz what reads bytes from the network: python tests/fuzz_wire.py -max_total_time=120  (options are libFuzzer's)."""

from __future__ import annotations

import sys

import atheris
import torch

with atheris.instrument_imports(include=["dlora.net.codec", "json"]):
    from dlora.net import codec

EXPECTED: codec.Expected = {
    "a.lora_A": (torch.float32, (2, 3)),
    "a.lora_B": (torch.float32, (3, 2)),
    "bias": (torch.float32, (4,)),
}
NUM_BYTES = codec.message_num_bytes(EXPECTED)


def one_input(data: bytes) -> None:
    """Neither decoder may raise anything but its own error."""
    try:
        frame = codec.decode_frame(data)
    except codec.FrameError:
        pass
    else:
        assert codec.decode_frame(codec.encode_frame(frame)) == frame
    try:
        tensors = codec.decode_tensors(data[:NUM_BYTES].ljust(NUM_BYTES, b" "), EXPECTED)
    except codec.MessageError:
        pass
    else:
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == EXPECTED


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
