"""How long a peer waits for a neighbour, and what ends a wait; time is the event loop's.

- After ``silence_s`` without a frame, this peer does not wait for the neighbour until it links
again. Every frame counts, and a peer sends its round while it trains. After ``round_limit_s`` a
wait ends even if frames still come.

- A neighbour that delivered nothing in ``STALLS`` rounds of waiting is waited for only
``silence_s``, until an edge with it is mixed again. After 4, 8, 16, ... such rounds it gets a whole
``round_limit_s`` once more, because it may only be slow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from dlora.decentralized.peer.neighbour import Neighbour

STALLS = 3  # rounds without a delivery although the neighbour was linked
BEATS = 4  # how often within `silence_s` a peer without other frames sends its round


@dataclass(frozen=True)
class Patience:
    """How long to wait for a neighbour."""

    silence_s: float  # seconds without a single frame
    round_limit_s: float  # seconds for one round's exchange, even if frames still come


class Waits:
    """All waits of one peer; each wait checks its condition again after every change."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._changed = asyncio.Event()

    async def until(
        self, other: Neighbour, done: Callable[[], bool], started_at: float
    ) -> str | None:
        """Wait for ``done``; returns None, or one line that says why the wait ended without it.

        ``started_at``: loop time at which the waiting began.
        """
        loop = asyncio.get_running_loop()
        short = other.stalls >= STALLS and other.stalls & (other.stalls - 1) != 0
        limit_s = self.patience.silence_s if short else self.patience.round_limit_s
        limit_at = started_at + limit_s
        while not done():
            if other.refused:
                return other.refused
            if other.away:
                return "it is away"
            silent_at = max(other.heard_at, started_at) + self.patience.silence_s
            if loop.time() >= silent_at:
                other.away = True
                return f"nothing came for {self.patience.silence_s:g} s"
            if loop.time() >= limit_at:
                return f"the round has waited {limit_s:g} s" + (
                    f", after {other.stalls} in vain" if short else ""
                )
            await self.change(min(silent_at, limit_at))
        return None

    async def change(self, until: float) -> None:
        """Wait for the next change, or until the loop time ``until``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._changed.wait()

    def pulse(self) -> None:
        """Wake all waits, because something has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def heard(self, other: Neighbour) -> None:
        """Note that a frame came from a neighbour."""
        other.heard_at, other.away = asyncio.get_running_loop().time(), False
        self.pulse()
