"""The contract of a wire, and the byte counter: `memory.py` and `grpc.py` keep it.

A network keeps at most one link to each neighbour, dials again with growing pauses when one ends,
and calls ``talk`` for each new link. A frame that was sent arrives whole, once and in order, or the
link ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from dlora.wire.frame import Link


class LinkDown(Exception):
    """The link has ended, whoever ended it; what was sent last may or may not have arrived."""


Talk: TypeAlias = Callable[[str, Link], Awaitable[None]]


class Network(Protocol):
    """All links of one participant."""

    traffic: Traffic

    async def serve(self, talk: Talk) -> None:
        """Listen, dial, and run ``talk(neighbour, link)`` for every link until cancelled; when it
        returns, the link ends.
        """


@dataclass
class Traffic:
    """Bytes of serialised frames, by neighbour; sent and received apart. TLS and HTTP/2 come on top
    (law 8).
    """

    sent_bytes: dict[str, int] = field(default_factory=dict)
    received_bytes: dict[str, int] = field(default_factory=dict)

    def sent(self, neighbour: str, num_bytes: int) -> None:
        """Count a frame that was handed to the wire."""
        self.sent_bytes[neighbour] = self.sent_bytes.get(neighbour, 0) + num_bytes

    def received(self, neighbour: str, num_bytes: int) -> None:
        """Count a frame that arrived."""
        self.received_bytes[neighbour] = self.received_bytes.get(neighbour, 0) + num_bytes
