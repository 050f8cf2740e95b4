"""Fuzz what reads bytes from the network: python tests/wire/fuzz_wire.py -max_total_time=120
(options are libFuzzer's).
"""

from __future__ import annotations

import sys

import atheris
import torch

with atheris.instrument_imports(
    include=[
        "dlora.wire.frame",
        "dlora.wire.tensors",
        "dlora.wire.peer.codec",
        "dlora.wire.split.codec",
        "json",
    ]
):
    from dlora.wire.frame import FrameError
    from dlora.wire.peer import codec
    from dlora.wire.split import codec as split_codec
    from dlora.wire.split.frames import WIRES, Begin, Values
    from dlora.wire.tensors import Expected, MessageError, decode_tensors, message_num_bytes

EXPECTED: Expected = {
    "a.lora_A": (torch.float32, (2, 3)),
    "a.lora_B": (torch.float32, (3, 2)),
    "bias": (torch.float32, (4,)),
}
NUM_BYTES = message_num_bytes(EXPECTED)


def one_input(data: bytes) -> None:
    """No decoder may raise anything but its own error."""
    try:
        frame = codec.decode_frame(data)
    except FrameError:
        pass
    else:
        assert codec.decode_frame(codec.encode_frame(frame)) == frame
    try:
        tensors = decode_tensors(data[:NUM_BYTES].ljust(NUM_BYTES, b" "), EXPECTED)
    except MessageError:
        pass
    else:
        assert {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
        } == EXPECTED
    for wire in WIRES:
        try:
            split = split_codec.decode_split(data, wire)
        except FrameError:
            continue
        tensor = (
            split.embedded
            if isinstance(split, Begin)
            else split.tensor
            if isinstance(split, Values)
            else None
        )
        assert tensor is None or (
            tensor.dtype == torch.float32 and tensor.dim() == 2 and bool(tensor.isfinite().all())
        )
        if wire != "int8":  # whose largest values, once rounded, are too large to be sent
            assert len(split_codec.encode_split(split, wire)) == split_codec.split_num_bytes(
                split, wire
            )


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
