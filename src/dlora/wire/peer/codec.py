"""Writes frames between peers as bytes and reads them, with limits: protobuf, never pickle."""

from __future__ import annotations

import re

from dlora.wire.frame import MAX_MANIFEST_BYTES, MAX_NUMBER, FrameError, FrameKind, parse
from dlora.wire.peer import peer_pb2
from dlora.wire.peer.frames import (
    MAX_CHUNK_BYTES,
    SIGNATURE_BYTES,
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

# the other fields of a frame take less than 400 bytes
MAX_FRAME_BYTES = max(MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES) + 1024
_KINDS: dict[str, type[Frame]] = {
    "hello": Hello,
    "status": Status,
    "offer": Offer,
    "want": Want,
    "chunk": Chunk,
    "have": Have,
    "decided": Decided,
    "shown": Shown,
}
_FIELDS: dict[type[Frame], str] = {kind: field for field, kind in _KINDS.items()}
_NAME = re.compile(r"[a-z0-9-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def encode_frame(frame: Frame) -> bytes:
    """The bytes of a frame. Raises FrameError when ``decode_frame`` would refuse them."""
    _check(frame)
    field = _FIELDS[type(frame)]
    return peer_pb2.Frame(
        **{field: getattr(peer_pb2, type(frame).__name__)(**vars(frame))}
    ).SerializeToString()


def decode_frame(data: bytes) -> Frame:
    """The frame that these bytes encode. Raises FrameError when they encode no allowed frame.

    It uses at most a few times ``MAX_FRAME_BYTES`` of memory.
    """
    if len(data) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes; at most {MAX_FRAME_BYTES} are allowed")
    field, inner = parse(peer_pb2.Frame, data)
    kind = _KINDS[field]
    frame = kind(**{name: getattr(inner, name) for name in kind.__dataclass_fields__})
    _check(frame)
    return frame


def _check(frame: Frame) -> None:
    """Raise FrameError when a field is outside the limits for its name."""
    kind = type(frame).__name__
    for field, value in vars(frame).items():
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            if not 0 <= value < MAX_NUMBER:
                raise FrameError(f"{kind} frame: {field} {value} is not between 0 and 2^53")
        elif field == "data":
            if not 0 < len(value) <= MAX_CHUNK_BYTES:
                raise FrameError(
                    f"{kind} frame: {len(value)} bytes of data; 1 to {MAX_CHUNK_BYTES} are allowed"
                )
        elif field == "signature":
            if len(value) not in (0, SIGNATURE_BYTES):
                raise FrameError(
                    f"{kind} frame: a signature of {len(value)} bytes; it has {SIGNATURE_BYTES}, or"
                    " none is there"
                )
        elif field == "manifest":
            if len(value.encode()) > MAX_MANIFEST_BYTES:
                raise FrameError(
                    f"{kind} frame: a manifest of more than {MAX_MANIFEST_BYTES} bytes"
                )
        elif field == "name":
            if not _NAME.fullmatch(value):
                raise FrameError(
                    f"{kind} frame: the message name {value[:80]!r} is not 1 to 64 of a-z, 0-9"
                    " and -"
                )
        elif not _SHA256.fullmatch(value):
            raise FrameError(f"{kind} frame: {field} {value[:80]!r} is not a SHA-256 in hex")


PEERS = FrameKind(
    "dlora.Peer", encode_frame, decode_frame, MAX_FRAME_BYTES, frames_per_s=200, frames_at_once=500
)
