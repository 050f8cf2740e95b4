"""What every network must do (`memory.py` and `grpc.py` are networks), and the byte counter.

A network keeps at most one link with each neighbour. When a link ends, it dials again after a
pause, and the pauses grow. It calls ``talk`` for each new link. Every sent frame arrives whole,
once and in order, or the link ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from dlora.wire.frame import Link


class LinkDown(Exception):
    """The link has ended, at either end. The frames sent last may or may not have arrived."""


Talk: TypeAlias = Callable[[str, Link], Awaitable[None]]


class Network(Protocol):
    """All links of one participant."""

    traffic: Traffic

    async def serve(self, talk: Talk) -> None:
        """Listen, dial, and run ``talk(neighbour, link)`` for every link until cancelled.

        A link ends when its ``talk`` returns.
        """


@dataclass
class Traffic:
    """Bytes of serialised frames for each neighbour, sent and received apart.

    The bytes that TLS and HTTP/2 add are not counted (law 8).
    """

    sent_bytes: dict[str, int] = field(default_factory=dict)
    received_bytes: dict[str, int] = field(default_factory=dict)

    def sent(self, neighbour: str, num_bytes: int) -> None:
        """Count a frame that is sent."""
        self.sent_bytes[neighbour] = self.sent_bytes.get(neighbour, 0) + num_bytes

    def received(self, neighbour: str, num_bytes: int) -> None:
        """Count a frame that arrived."""
        self.received_bytes[neighbour] = self.received_bytes.get(neighbour, 0) + num_bytes
