"""The contract of a wire, and the byte counter: `memory.py` and `grpc.py` keep it.

A network keeps at most one link to each neighbour, dials again with growing pauses when one ends, and calls ``talk`` for each
new link. A frame that was sent arrives whole, once and in order, or the link ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from dlora.net.codec import MAX_FRAME_BYTES, decode_frame, encode_frame


class LinkDown(Exception):
    """The link has ended, whoever ended it; what was sent last may or may not have arrived."""


@dataclass(frozen=True)
class FrameKind:
    """What the links of a network carry, and how it is written."""

    service: str  # gRPC's name for it
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]  # raises FrameError
    max_bytes: int  # of one frame; a longer one is refused by its announced length, before memory is taken
    frames_per_s: float = 1e9  # small ones of one member; more wait at its end
    frames_at_once: int = 1  # before that


PEERS = FrameKind("dlora.Peer", encode_frame, decode_frame, MAX_FRAME_BYTES, frames_per_s=200, frames_at_once=500)


class Link(Protocol):
    """One connection with one neighbour, whose identity the wire has proved. A frame is what the network's kind says."""

    async def send(self, frame: Any) -> None:
        """Hand a frame to the wire; waits while the other end is slow to take frames. Raises LinkDown."""

    async def receive(self) -> Any:
        """The next frame, checked against the limits of its kind. Raises LinkDown at the end."""


Talk: TypeAlias = Callable[[str, Link], Awaitable[None]]


class Network(Protocol):
    """All links of one participant."""

    traffic: Traffic

    async def serve(self, talk: Talk) -> None:
        """Until cancelled: listen, dial, and run ``talk(neighbour, link)`` for every link; when it returns, the link ends."""


@dataclass
class Traffic:
    """Bytes of serialised frames, by neighbour; sent and received apart. TLS and HTTP/2 come on top (law 8)."""

    sent_bytes: dict[str, int] = field(default_factory=dict)
    received_bytes: dict[str, int] = field(default_factory=dict)

    def sent(self, neighbour: str, num_bytes: int) -> None:
        """Count a frame that was handed to the wire."""
        self.sent_bytes[neighbour] = self.sent_bytes.get(neighbour, 0) + num_bytes

    def received(self, neighbour: str, num_bytes: int) -> None:
        """Count a frame that arrived."""
        self.received_bytes[neighbour] = self.received_bytes.get(neighbour, 0) + num_bytes
