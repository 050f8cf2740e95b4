"""How long a peer waits for a neighbour, and what ends a wait; time is the event loop's.

- A neighbour that was silent for ``silence_s`` is not waited for until it links again. Anything
  that comes counts as news, and a peer says where it is while it trains. After ``round_limit_s`` a
  wait ends whatever still comes.
- Who delivered nothing in ``STALLS`` rounds of waiting is waited for ``silence_s``, until an edge
  with it is mixed again. It gets a whole ``round_limit_s`` once more after 4, 8, 16, ... such
  rounds, should it only be slow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from dlora.decentralized.peer.neighbour import Neighbour

STALLS = 3  # rounds without a delivery, the neighbour linked all the while
BEATS = 4  # times within `silence_s` that a peer with nothing to say says where it is


@dataclass(frozen=True)
class Patience:
    """How long to wait for a neighbour."""

    silence_s: float  # without a single frame
    round_limit_s: float  # for one round's exchange, whatever still comes


class Waits:
    """All waits of one peer; each looks again whenever something has changed."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._changed = asyncio.Event()

    async def until(
        self, other: Neighbour, done: Callable[[], bool], started_at: float
    ) -> str | None:
        """Wait for ``done``; else say why the wait ended."""
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
        """Wait until something changed, or until that loop time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._changed.wait()

    def pulse(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def heard(self, other: Neighbour) -> None:
        """Something came from a neighbour."""
        other.heard_at, other.away = asyncio.get_running_loop().time(), False
        self.pulse()
