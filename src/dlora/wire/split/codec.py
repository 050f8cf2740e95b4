"""Writes frames between cloud and device as bytes and reads them, with limits; three wire dtypes.

float32 and bfloat16 are written directly. int8 is quantised dynamically, row by row (a row is a
token): a row's scale is its largest absolute value / 127, and each value is rounded to the nearest
multiple of the scale. The error is at most half a scale.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlora.wire.frame import MAX_MANIFEST_BYTES, MAX_NUMBER, FrameError, FrameKind, parse
from dlora.wire.split import split_pb2
from dlora.wire.split.frames import (
    FIRST_VERSION,
    WHATS,
    WHYS,
    Begin,
    HandOff,
    SplitFrame,
    Values,
    Wire,
)

MAX_SIDE = 1 << 20  # rows of a tensor, its width, tokens of a padded part
# numbers in the factors of one unit; enough for r 128, three modules of width 32,768 and an input
# of width 32,768
MAX_FACTORS = 1 << 24
MAX_UNITS = 1 << 16  # units of a model
MAX_TEXT_BYTES = 2000
# limit for a frame without its tensor; positions, masks and types of MAX_SIDE tokens take 7.3 MiB
MAX_HEAD_BYTES = 8 << 20

_KINDS: dict[str, type[SplitFrame]] = {kind.__name__.lower(): kind for kind in SplitFrame.__args__}
_LIMITS = {
    "seed": 1 << 63,
    "positions": 1 << 31,
    "rows": MAX_SIDE + 1,
    "columns": MAX_SIDE + 1,
    "width": MAX_SIDE + 1,
}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
# protobuf's tag for the field payload, as bytes with their length before them (wire type 2)
_PAYLOAD_TAG = bytes([split_pb2.Frame.PAYLOAD_FIELD_NUMBER << 3 | 2])
_MAX_SCALE = torch.finfo(torch.float32).max / 128  # so that scale x any int8 is finite


def encode_split(frame: SplitFrame, wire: Wire) -> bytes:
    """The bytes of a frame; ``reason`` and ``text`` are cut to one line of ``MAX_TEXT_BYTES``.

    Raises FrameError when ``decode_split`` would refuse the frame, for example because a value of
    its tensor is not finite.
    """
    head, tensor = _head(frame)
    if tensor is None:
        return head.SerializeToString()
    payload = _payload(tensor.detach(), _dtype(type(frame), wire), type(frame).__name__)
    num_bytes = sum(part.nbytes for part in payload)
    return b"".join([head.SerializeToString(), _PAYLOAD_TAG, _varint(num_bytes), *payload])


def split_num_bytes(frame: SplitFrame, wire: Wire) -> int:
    """The length in bytes that ``encode_split`` gives.

    Only the tensor's shape is read, so the tensor may be on the torch device ``meta``.
    """
    head, tensor = _head(frame)
    if tensor is None:
        return head.ByteSize()
    num_bytes = _payload_bytes(len(tensor), tensor.shape[1], _dtype(type(frame), wire))
    return head.ByteSize() + len(_PAYLOAD_TAG) + len(_varint(num_bytes)) + num_bytes


def decode_split(data: bytes, wire: Wire) -> SplitFrame:
    """The frame that these bytes encode; its tensor is (rows, width) float32 on the CPU.

    The tensor has its own memory. Raises FrameError when the bytes encode no allowed frame; limits
    are checked before memory for the tensor is allocated. The caller limits the length of ``data``.
    """
    head, payload = _cut(data)
    field, inner = parse(split_pb2.Frame, head)
    kind = _KINDS[field]
    fields = {name: getattr(inner, name) for name in inner.DESCRIPTOR.fields_by_name}
    if kind not in (Begin, Values, HandOff):
        if payload:
            raise FrameError(
                f"{kind.__name__} frame: {len(payload)} bytes of a tensor; it has none"
            )
        _check(kind.__name__, fields)
        return kind(**fields)
    if kind is Begin:
        fields["positions"], fields["units"] = tuple(fields["positions"]), tuple(fields["units"])
        fields["seed"] = fields["seed"] if inner.HasField("seed") else None
    _check(kind.__name__, fields)
    width = fields.pop("width")
    rows = _num_tokens(fields) if kind is Begin else fields.pop("rows", 1)
    tensor = _tensor(payload, rows, width, _dtype(kind, wire), kind.__name__)
    fields["embedded" if kind is Begin else "tensor"] = tensor
    return kind(**fields)


def _dtype(kind: type[SplitFrame], wire: Wire) -> Wire:
    """The dtype in which a frame's tensor is written.

    Factors are always float32, so that the cloud uses exactly the factors that were trained.
    """
    return "float32" if kind is HandOff else wire


def _cut(data: bytes) -> tuple[bytes, memoryview]:
    """Cut a frame into the bytes for protobuf and the payload, as ``encode_split`` joined them.

    protobuf does not see the payload, because it would copy it twice. Raises FrameError when the
    lengths do not fit.
    """
    head_bytes, start = _length_at(data, 1)
    end = start + head_bytes
    if not end <= len(data) or end > MAX_HEAD_BYTES:
        raise FrameError(
            f"a frame of {len(data)} bytes with a head of {end}; at most {MAX_HEAD_BYTES} are"
            " allowed"
        )
    if end == len(data):
        return data, memoryview(b"")
    payload_bytes, start = _length_at(data, end + 1)
    if data[end : end + 1] != _PAYLOAD_TAG or start + payload_bytes != len(data):
        raise FrameError(f"a frame of {len(data)} bytes with unknown fields, or cut off")
    return data[:end], memoryview(data)[start:]


def _length_at(data: bytes, place: int) -> tuple[int, int]:
    """(the length that protobuf wrote at ``place``, the place where the counted bytes begin)."""
    number = 0
    for shift, byte in zip(range(0, 35, 7), data[place : place + 5], strict=False):
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place + shift // 7 + 1
    raise FrameError(f"{len(data)} bytes that are no frame")


def _head(frame: SplitFrame) -> tuple[split_pb2.Frame, Tensor | None]:
    """The protobuf message without its payload, and the tensor for the payload.

    Everything is checked but the tensor's values. Raises FrameError.
    """
    kind, fields = type(frame).__name__, dict(vars(frame))
    for name in ("reason", "text"):
        if name in fields:
            fields[name] = _one_line(fields[name])
    tensor: Tensor | None = None
    if isinstance(frame, Begin | Values | HandOff):
        tensor = fields.pop("embedded" if isinstance(frame, Begin) else "tensor")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise FrameError(
                f"{kind} frame: a tensor {tuple(tensor.shape)} of {tensor.dtype}; it should be"
                " (tokens, width)"
            )
        fields["width"] = tensor.shape[1]
        if isinstance(frame, Values):
            fields["rows"] = tensor.shape[0]
        elif isinstance(frame, HandOff) and len(tensor) != 1:
            raise FrameError(f"HandOff frame: a tensor of {len(tensor)} rows; factors stand in one")
    _check(kind, fields)
    if (
        isinstance(frame, Begin)
        and tensor is not None
        and len(tensor) != (num_tokens := _num_tokens(fields))
    ):
        raise FrameError(
            f"Begin frame: {len(tensor)} rows of embedded; the mask has {num_tokens} tokens"
        )
    return split_pb2.Frame(**{kind.lower(): getattr(split_pb2, kind)(**fields)}), tensor


def _check(kind: str, fields: dict[str, Any]) -> None:
    """Raise FrameError when a field is outside its limits, or fields of ``Begin`` do not fit."""
    for name, value in fields.items():
        if isinstance(value, bool) or value is None:
            continue
        if name in ("manifest", "reason", "text"):
            limit = MAX_MANIFEST_BYTES if name == "manifest" else MAX_TEXT_BYTES
            if len(value.encode()) > limit:
                raise FrameError(
                    f"{kind} frame: {name} has {len(value.encode())} bytes; at most {limit} are"
                    " allowed"
                )
            if name != "manifest" and not value.isprintable():  # a terminal shows it
                raise FrameError(
                    f"{kind} frame: {name} has characters that are not for printing, or several"
                    " lines"
                )
        elif name in ("what", "why"):
            known = WHATS if name == "what" else WHYS
            if value not in known:
                raise FrameError(
                    f"{kind} frame: {name} {ascii(value[:80])} is none of {', '.join(known)}"
                )
        elif not isinstance(value, bytes):
            least = (
                FIRST_VERSION if name == "version" else int(name in ("rows", "columns", "width"))
            )
            limit = (
                MAX_FACTORS + 1
                if kind == "HandOff" and name == "width"
                else _LIMITS.get(name, MAX_NUMBER)
            )
            low, high = (
                (min(value, default=least), max(value, default=least))
                if isinstance(value, tuple)
                else (value, value)
            )
            if not least <= low <= high < limit:
                raise FrameError(
                    f"{kind} frame: {name} {low if low < least else high} is not between {least}"
                    f" and {limit - 1}"
                )
    if kind == "Begin":
        _check_tokens(fields)


def _check_tokens(fields: dict[str, Any]) -> None:
    """Raise FrameError unless ``Begin`` has one bit, type and position per token, where given."""
    num_places = fields["rows"] * fields["columns"]
    if num_places > MAX_SIDE:
        raise FrameError(
            f"Begin frame: {fields['rows']} rows of {fields['columns']} tokens; at most {MAX_SIDE}"
            " tokens"
        )
    _check_bits("mask", fields["mask"], num_places)
    num_tokens = _num_tokens(fields)
    if num_tokens == 0:
        raise FrameError("Begin frame: the mask has no tokens")
    if fields["needed"]:
        _check_bits("needed", fields["needed"], num_tokens)
    if len(fields["units"]) > MAX_UNITS:
        raise FrameError(
            f"Begin frame: {len(fields['units'])} units; at most {MAX_UNITS} are allowed"
        )
    for name in ("token_types", "positions"):
        if len(fields[name]) not in (0, num_tokens):
            raise FrameError(f"Begin frame: {len(fields[name])} {name} for {num_tokens} tokens")
    if fields["packed"] and not (num_tokens == num_places == len(fields["positions"])):
        raise FrameError(
            "Begin frame: packed texts without a position for each place, or with padding"
        )


def _check_bits(name: str, data: bytes, num_bits: int) -> None:
    if len(data) != (num_bits + 7) // 8:
        raise FrameError(
            f"Begin frame: {name} has {len(data)} bytes; {num_bits} bits take {(num_bits + 7) // 8}"
        )
    if data[-1] & (1 << -num_bits % 8) - 1:
        raise FrameError(f"Begin frame: {name} has bits set beyond its {num_bits}")


def _num_tokens(fields: dict[str, Any]) -> int:
    return int.from_bytes(fields["mask"], "little").bit_count()


def _payload_bytes(rows: int, width: int, wire: Wire) -> int:
    return rows * width * _ITEM_BYTES[wire] + (4 * rows if wire == "int8" else 0)


def _payload(tensor: Tensor, wire: Wire, kind: str) -> list[memoryview]:
    """The tensor's bytes, as one or two pieces (int8: scales, then values).

    The tensor is converted on its own device, so that fewer bytes are copied from a GPU.
    """
    if wire == "int8":
        rows = tensor.float()
        scales = rows.abs().amax(1, keepdim=True) / 127
        if not bool((scales <= _MAX_SCALE).all()):  # false for NaN
            raise FrameError(f"{kind} frame: a value that is not finite")
        whole = (
            (rows / torch.where(scales > 0, scales, 1)).round_().clamp_(-127, 127).to(torch.int8)
        )
        return [_bytes_of(scales), _bytes_of(whole)]
    rows = tensor.to(torch.bfloat16 if wire == "bfloat16" else torch.float32)
    if not _is_finite(rows):
        raise FrameError(f"{kind} frame: a value that is not finite")
    return [_bytes_of(rows)]


def _tensor(payload: memoryview, rows: int, width: int, wire: Wire, kind: str) -> Tensor:
    expected = _payload_bytes(rows, width, wire)
    if len(payload) != expected:
        raise FrameError(
            f"{kind} frame: {len(payload)} bytes of a tensor; ({rows}, {width}) in {wire} takes"
            f" {expected}"
        )
    # a copy, because a tensor's memory must be writable
    memory = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    if wire == "int8":
        scales = memory[: 4 * rows].view(torch.float32)[:, None]  # (rows, 1)
        if not bool(((scales >= 0) & (scales <= _MAX_SCALE)).all()):
            raise FrameError(f"{kind} frame: a scale that is negative or not finite")
        return memory[4 * rows :].view(torch.int8).view(rows, width).to(torch.float32).mul_(scales)
    tensor = memory.view(torch.bfloat16 if wire == "bfloat16" else torch.float32).view(rows, width)
    if not _is_finite(tensor):
        raise FrameError(f"{kind} frame: a value that is not finite")
    return tensor.float()


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite.

    ``aminmax`` returns NaN if there is one, and takes a tenth of the time of ``isfinite().all()``.
    """
    return all(math.isfinite(end.item()) for end in tensor.aminmax())


def _bytes_of(tensor: Tensor) -> memoryview:
    """A view of a tensor's memory as bytes; a tensor on another device is copied to the CPU."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _one_line(text: str) -> str:
    """The text on one line, cut to ``MAX_TEXT_BYTES``: a report of a failure must not fail."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")


def _varint(number: int) -> bytes:
    """A length as protobuf writes it: 7 bits per byte, lowest bits first.

    The high bit of a byte says that another byte follows.
    """
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


MAX_FRAME_BYTES = 256 << 20  # 16,384 tokens of width 4096 in float32


def split_kind(wire: Wire = "float32", max_bytes: int = MAX_FRAME_BYTES) -> FrameKind:
    """The kind of frames between cloud and device.

    ``wire``: the dtype in which tensors are sent; both ends must agree on it before.
    """
    return FrameKind(
        "dlora.split.Cloud",
        partial(encode_split, wire=wire),
        partial(decode_split, wire=wire),
        max_bytes,
    )
