"""What every frame has in common: its kind, its link, its errors, its bytes read within bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from google.protobuf.message import DecodeError

MAX_NUMBER = 2**53  # every JSON reader holds integers below it exactly


class FrameError(ValueError):
    """These bytes are not a frame, or a frame that no peer sends; one line says why."""


def parse(message_type: Any, data: bytes) -> tuple[str, Any]:
    """The kind of frame these bytes are, and its message. Raises FrameError for no frame, no known
    kind, unknown fields.
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


MAX_MANIFEST_BYTES = 1 << 20  # of a run's or a device's manifest


@dataclass(frozen=True)
class FrameKind:
    """What the links of a network carry, and how it is written."""

    service: str  # gRPC's name for it
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]  # raises FrameError
    # of one frame; a longer one is refused by its announced length, before memory is taken
    max_bytes: int
    frames_per_s: float = 1e9  # small ones of one member; more wait at its end
    frames_at_once: int = 1  # before that

    @property
    def as_bytes(self) -> FrameKind:
        """The same for a link whose frames are bytes already: a `Channel` reads and writes them in
        threads of its own.
        """
        return replace(self, encode=bytes, decode=bytes)


class Link(Protocol):
    """One connection with one neighbour, whose identity the wire has proved. A frame is what the
    network's kind says.
    """

    async def send(self, frame: Any) -> None:
        """Hand a frame to the wire; waits while the other end is slow to take frames. Raises
        LinkDown.
        """

    async def receive(self) -> Any:
        """The next frame, checked against the limits of its kind. Raises LinkDown at the end."""


class Misbehaviour(ValueError):
    """The other side said what nobody says who keeps the rules: its link is ended, nothing of it is
    used.
    """


class ChannelDown(Exception):
    """The link under a conversation has ended, whoever ended it."""
