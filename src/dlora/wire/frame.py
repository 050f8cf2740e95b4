"""What all frames have in common: kind, link, errors, and a parser that checks limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from google.protobuf.message import DecodeError

MAX_NUMBER = 2**53  # every JSON reader holds integers below it exactly


class FrameError(ValueError):
    """The bytes are no frame, or a frame that breaks a limit; the text says why in one line."""


def parse(message_type: Any, data: bytes) -> tuple[str, Any]:
    """Parse bytes as protobuf; returns the name of the frame's kind and its message.

    Raises FrameError when the bytes are no frame, or have no known kind, or have unknown fields.
    """
    try:
        message = message_type.FromString(data)
    except DecodeError:
        raise FrameError(f"{len(data)} bytes that are no frame") from None
    field = message.WhichOneof("kind")
    if field is None:
        raise FrameError("a frame of no known kind")
    num_bytes = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != num_bytes:
        raise FrameError(f"a {field} frame with unknown fields")
    return field, getattr(message, field)


MAX_MANIFEST_BYTES = 1 << 20  # limit for the manifest of a run or a device


@dataclass(frozen=True)
class FrameKind:
    """The frames of one network: how they are written, and their limits."""

    service: str  # the name of the gRPC service
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]  # raises FrameError
    # A longer frame is refused because of its announced length, before memory is allocated.
    max_bytes: int
    # Small frames that one member may send per second; frames beyond that wait at the sender.
    frames_per_s: float = 1e9
    frames_at_once: int = 1  # frames that a member may send at once before that rate holds

    @property
    def as_bytes(self) -> FrameKind:
        """The same kind for a link that carries bytes.

        A `Channel` uses it, because it encodes and decodes the frames in its own threads.
        """
        return replace(self, encode=bytes, decode=bytes)


class Link(Protocol):
    """One connection with one neighbour, whose identity the transport has checked.

    The network's `FrameKind` says which frames it carries.
    """

    async def send(self, frame: Any) -> None:
        """Send a frame; waits while the other end takes frames slowly.

        Raises LinkDown when the link has ended.
        """

    async def receive(self) -> Any:
        """The next frame, checked against its limits. Raises LinkDown when the link has ended."""


class Misbehaviour(ValueError):
    """The other side sent a frame that breaks the protocol.

    Its link is ended, and nothing of this frame is used.
    """


class ChannelDown(Exception):
    """The link of a split conversation has ended. Either side or the network may have ended it."""
