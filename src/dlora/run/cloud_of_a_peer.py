"""A device with neighbours while its cloud is away: it sends nothing, so its neighbours go on."""

from __future__ import annotations

import asyncio

from dlora.decentralized.peer.patience import BEATS
from dlora.events.log import RunLog
from dlora.net.transport import Talk
from dlora.run.frozen_model import CloudWord, teller
from dlora.wire.frame import Link

LOOK_S = 0.2  # seconds between two looks at a value that another thread sets
# seconds for which a new link stays silent; the other end closes it after FIRST_FRAME_S (20) of net
HOLD_S = 10.0


class CloudOfAPeer:
    """Whether the cloud ``name`` is away; `far_cloud` tells it from the thread that uses
    the cloud.
    """

    def __init__(self, log: RunLog, name: str) -> None:
        self._tell, self.is_away = teller(log, name), False

    def hear(self, event: CloudWord, reason: str) -> None:
        """Take one event of `far_cloud`."""
        if event in ("cloud-lost", "cloud-silent", "cloud-back"):
            self.is_away = event != "cloud-back"
        self._tell(event, reason)

    async def talk_unless_away(self, talk: Talk, silence_s: float, name: str, link: Link) -> None:
        """Talk with the neighbour ``name``, but send nothing while the cloud is away.

        A device that cannot train is away for its neighbours, and ``silence_s`` limits how long
        they wait. A new link is kept silent for a while, so that it can be used if the cloud comes
        back soon.
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
