"""Writes tensors as bytes and reads them with every check first: safetensors, never pickle."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save
from torch import Tensor

Expected: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype, shape

# safetensors' names
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class MessageError(ValueError):
    """The bytes are not the expected tensors; the text says why in one line."""


def encode(tensors: Mapping[str, Tensor], wire: torch.dtype) -> bytes:
    """One message: header and payload of one participant's tensors, in the dtype ``wire``."""
    return save(
        {name: tensor.detach().to("cpu", wire).contiguous() for name, tensor in tensors.items()}
    )


def pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes that safetensors' `save` gives, tensor by tensor.

    A contiguous tensor on the CPU is not copied, so that a file takes no memory to write.
    """
    known = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    text, _ = _layout(known, metadata)
    yield len(text).to_bytes(8, "little") + text
    for name in _in_order(known):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def message_num_bytes(expected: Expected) -> int:
    """The length in bytes that ``encode`` gives for tensors of these dtypes and shapes.

    A message of another length is refused.
    """
    header, payload_bytes = _layout(expected)
    return 8 + len(header) + payload_bytes


def held(data: bytes | Path, known: Expected) -> Expected:
    """The entries of ``known`` that a message names in its header.

    A message may leave out some of the known tensors; pass the result to `decode_tensors`, which
    checks the rest. Only the header is read, and at most as many bytes as a header of all known
    tensors has. Raises MessageError when the header is longer, is not valid, or names an unknown
    tensor; raises OSError when the file cannot be opened.
    """
    most = 8 + len(_layout(known)[0])
    if isinstance(data, Path):
        with data.open("rb") as file:
            start = file.read(most)
    else:
        start = data[:most]
    header_bytes = int.from_bytes(start[:8], "little")
    if header_bytes > len(start) - 8:
        raise MessageError(
            f"the header announces {header_bytes} bytes; it should be at most {most - 8}"
        )
    header = _header(start[8 : 8 + header_bytes])
    if not isinstance(header, dict) or not header or not header.keys() <= known.keys():
        odd = sorted(set(header) - set(known))[:3] if isinstance(header, dict) else []
        raise MessageError(
            f"the message does not hold known tensors: {', '.join(map(_short, odd)) or 'no names'}"
        )
    return {name: known[name] for name in known if name in header}


def decode_tensors(data: bytes | Path, expected: Expected) -> dict[str, Tensor]:
    """The tensors of a message, exactly the expected ones, in the order of ``expected``.

    A file is mapped into memory, so it must not change while the tensors are used. Before any
    tensor is made, raises MessageError when the length, the header, a name, dtype, shape or offset
    is not the expected one. Raises MessageError too when a value is not finite, and OSError when
    the file cannot be opened.
    """
    num_bytes = data.stat().st_size if isinstance(data, Path) else len(data)
    if num_bytes != message_num_bytes(expected):
        raise MessageError(
            f"the message has {num_bytes} bytes; it should have {message_num_bytes(expected)}"
        )
    if isinstance(data, bytes):
        # a copy, because a tensor's memory must be writable
        return _decode(bytearray(data), expected)
    with data.open("rb") as file:
        return _decode(mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_COPY), expected)


def _decode(buffer: bytearray | mmap.mmap, expected: Expected) -> dict[str, Tensor]:
    header_bytes = len(_layout(expected)[0])
    if int.from_bytes(buffer[:8], "little") != header_bytes:
        raise MessageError(
            f"the header announces {int.from_bytes(buffer[:8], 'little')} bytes; it should be"
            f" {header_bytes}"
        )
    starts = _starts(_header(buffer[8 : 8 + header_bytes]), expected)
    tensors = {}
    for name, (dtype, shape) in expected.items():
        tensor = torch.frombuffer(
            buffer, dtype=dtype, count=math.prod(shape), offset=8 + header_bytes + starts[name]
        )
        check_finite(name, tensor)
        tensors[name] = tensor.view(shape)
    return tensors


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise MessageError if the tensor ``name`` holds a value that is not finite."""
    # a sum is faster than a look at each number; it may overflow though all are finite
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise MessageError(f"{name} holds a value that is not finite")


def _header(text: bytes | bytearray) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except MessageError:
        raise
    except (ValueError, RecursionError):
        raise MessageError("the header is not JSON") from None


def _starts(header: object, expected: Expected) -> dict[str, int]:
    """Where in the payload each tensor begins, in bytes.

    The caller has already checked the length of the payload. Raises MessageError when the header
    does not describe the expected tensors, one after the other without gaps.
    """
    if not isinstance(header, dict) or header.keys() != expected.keys():
        odd = sorted(set(header) ^ set(expected))[:3] if isinstance(header, dict) else []
        raise MessageError(
            "the message does not hold exactly the expected tensors:"
            f" {', '.join(map(_short, odd)) or 'no names'}"
        )
    starts: dict[str, int] = {}
    for name, (dtype, shape) in expected.items():
        entry, size = header[name], math.prod(shape) * dtype.itemsize
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise MessageError(
                f"{name}: its header has other keys than dtype, shape and data_offsets"
            )
        if entry["dtype"] != _DTYPES[dtype]:
            raise MessageError(
                f"{name}: dtype {_short(entry['dtype'])}; it should be {_DTYPES[dtype]}"
            )
        if not _is_list(entry["shape"]) or entry["shape"] != list(shape):
            raise MessageError(
                f"{name}: shape {_short(entry['shape'])}; it should be {list(shape)}"
            )
        offsets = entry["data_offsets"]
        if not _is_list(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
            raise MessageError(f"{name}: data_offsets {_short(offsets)} do not hold {size} bytes")
        starts[name] = offsets[0]
    end = 0
    for name in sorted(starts, key=lambda name: starts[name]):
        if starts[name] != end:
            raise MessageError(
                f"{name}: its data begin at byte {_short(starts[name])}; they should begin at {end}"
            )
        end += math.prod(expected[name][1]) * expected[name][0].itemsize
    return starts


def _in_order(expected: Expected) -> list[str]:
    """The names as safetensors sorts them: by item size, the largest first, then by name."""
    return sorted(expected, key=lambda name: (-expected[name][0].itemsize, name))


def _layout(expected: Expected, metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """(the header, bytes of the payload). safetensors pads the header to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in _in_order(expected):
        dtype, shape = expected[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust((len(text) + 7) // 8 * 8), end


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise MessageError("the header names something twice")
    return names


def _is_list(value: object) -> bool:
    """Whether this is a list of integers only. True and 4.0 are refused, though True == 1."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _short(value: object) -> str:
    """The value as JSON on one line of at most 80 characters, for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
