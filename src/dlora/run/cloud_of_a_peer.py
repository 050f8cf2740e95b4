"""A device among neighbours whose cloud is away: it does not talk, so its neighbours go on."""

from __future__ import annotations

import asyncio

from dlora.decentralized.peer.patience import BEATS
from dlora.events.log import RunLog
from dlora.net.transport import Talk
from dlora.run.frozen_model import teller
from dlora.wire.frame import Link

LOOK_S = 0.2  # between two looks at what another thread has found out
# for which a link stays silent from its start; after net's FIRST_FRAME_S, 20, the other end ends it
HOLD_S = 10.0


class CloudOfAPeer:
    """Whether the cloud ``name`` is away, as `far_cloud` tells from the thread that needs it."""

    def __init__(self, log: RunLog, name: str) -> None:
        self._tell, self.is_away = teller(log, name), False

    def hear(self, event: str, reason: str) -> None:
        """One event of `far_cloud`."""
        if event in ("cloud-lost", "cloud-silent", "cloud-back"):
            self.is_away = event != "cloud-back"
        self._tell(event, reason)

    async def talk_unless_away(self, talk: Talk, silence_s: float, name: str, link: Link) -> None:
        """Send nothing while the cloud is away: who cannot go on is away too, and ``silence_s``
        bounds what that costs the neighbours.

        New links are held for a while, so that there is one to talk over when the cloud is back.
        """
        clock = asyncio.get_running_loop()
        held_until = clock.time() + min(HOLD_S, silence_s / BEATS)
        while self.is_away and clock.time() < held_until:
            await asyncio.sleep(LOOK_S)
        talking = asyncio.ensure_future(talk(name, link))
        try:
            while not self.is_away and not talking.done():
                await asyncio.wait({talking}, timeout=LOOK_S)
            if talking.done():
                talking.result()
        finally:
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)
