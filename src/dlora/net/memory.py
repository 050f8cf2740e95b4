"""A network of queues inside one process, which does what `transport.py` asks of a network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from dlora.net.transport import LinkDown, Talk, Traffic
from dlora.wire.frame import FrameError, FrameKind

MAX_PAUSE_S = 10.0  # between two attempts to dial
WINDOW_FRAMES = 8  # frames that one end may be ahead of the other


class MemoryLink:
    """One end of a link: frames are serialised, queued, and read again at the other end."""

    def __init__(self, hub: MemoryHub, here: str, there: str, traffic: Traffic) -> None:
        self.hub, self.here, self.there, self.traffic = hub, here, there, traffic
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue(WINDOW_FRAMES)
        self.down = asyncio.Event()
        self.other: MemoryLink  # set by the hub

    async def send(self, frame: Any) -> None:
        """Queue a frame for the other end. Raises LinkDown when the link has ended.

        Waits while the other end's window is full, and without end while the hub loses frames.
        """
        data = self.hub.kind.encode(frame)
        await self._unless_down(self.hub.way(self.here, self.there).wait())
        await self._unless_down(self.other.inbox.put(data))
        self.traffic.sent(self.there, len(data))

    async def receive(self) -> Any:
        """The next frame. Raises LinkDown when the link has ended, FrameError for a bad frame."""
        data = await self._unless_down(self.inbox.get())
        assert data is not None
        if len(data) > self.hub.kind.max_bytes:
            raise FrameError(
                f"a frame of {len(data)} bytes; at most {self.hub.kind.max_bytes} are allowed"
            )
        self.traffic.received(self.there, len(data))
        return self.hub.kind.decode(data)

    def close(self) -> None:
        """End the link at both ends."""
        self.down.set()
        self.other.down.set()

    async def _unless_down(self, waiting: object) -> bytes | None:
        task = asyncio.ensure_future(waiting)  # type: ignore[call-overload]
        down = asyncio.ensure_future(self.down.wait())
        try:
            await asyncio.wait({task, down}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise LinkDown(f"the link from {self.here} to {self.there} has ended")
            return task.result()  # type: ignore[no-any-return]
        finally:
            task.cancel()
            down.cancel()


class MemoryHub:
    """The networks of several participants in one event loop, with faults that a test can make.

    ``neighbours``: for each participant the names of its neighbours. The smaller name dials.
    ``redial_s``: the first pause before it dials again.
    """

    def __init__(
        self, neighbours: Mapping[str, Sequence[str]], kind: FrameKind, redial_s: float = 0.2
    ) -> None:
        self.neighbours, self.redial_s, self.kind = neighbours, redial_s, kind
        self._served: dict[str, MemoryNetwork] = {}
        self._ways: dict[tuple[str, str], asyncio.Event] = {}
        self._cut: set[frozenset[str]] = set()

    def network(self, name: str) -> MemoryNetwork:
        """The network of one participant; a participant that starts again takes a new one."""
        return MemoryNetwork(self, name)

    def way(self, here: str, there: str) -> asyncio.Event:
        """An event that is set while frames from ``here`` reach ``there``.

        Clear it to hold the frames of this direction back.
        """
        if (here, there) not in self._ways:
            self._ways[here, there] = asyncio.Event()
            self._ways[here, there].set()
        return self._ways[here, there]

    def cut(self, one: str, two: str) -> None:
        """End the link between two participants and allow no new one."""
        self._cut.add(frozenset((one, two)))
        for network in (self._served.get(one), self._served.get(two)):
            for link in network.links if network else ():
                if {link.here, link.there} == {one, two}:
                    link.close()

    def mend(self, one: str, two: str) -> None:
        """Allow links between two participants again."""
        self._cut.discard(frozenset((one, two)))

    def dial(self, here: MemoryNetwork, there: str) -> tuple[MemoryLink, MemoryNetwork] | None:
        """(a new link to ``there``, that participant's network); None while it is not reachable."""
        other = self._served.get(there)
        if other is None or frozenset((here.name, there)) in self._cut:
            return None
        link, back = (
            MemoryLink(self, here.name, there, here.traffic),
            MemoryLink(self, there, here.name, other.traffic),
        )
        link.other, back.other = back, link
        return link, other

    def listen(self, network: MemoryNetwork, listening: bool) -> None:
        """Make a network reachable for the others, or end that."""
        if listening:
            self._served[network.name] = network
        elif self._served.get(network.name) is network:
            del self._served[network.name]


class MemoryNetwork:
    """All links of one participant in memory, as `transport.py` asks of a network."""

    def __init__(self, hub: MemoryHub, name: str) -> None:
        self.hub, self.name, self.traffic = hub, name, Traffic()
        self.links: set[MemoryLink] = set()
        self._talk: Talk
        self._tasks: asyncio.TaskGroup

    async def serve(self, talk: Talk) -> None:
        """Accept links and keep dialling each neighbour with a larger name, until cancelled."""
        self._talk = talk
        self.hub.listen(self, True)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for other in self.hub.neighbours[self.name]:
                    if self.name < other:
                        self._tasks.create_task(self._dial(other))
                await asyncio.Event().wait()
        finally:
            self.hub.listen(self, False)
            for link in [*self.links]:
                link.close()

    async def _dial(self, other: str) -> None:
        clock, pause_s = asyncio.get_running_loop(), self.hub.redial_s
        while True:
            made, began_at = self.hub.dial(self, other), clock.time()
            if made is not None:
                link, network = made
                network._tasks.create_task(network._run(link.other))
                await self._run(link)
            lived = clock.time() - began_at > pause_s
            pause_s = self.hub.redial_s if lived else min(2 * pause_s, MAX_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _run(self, link: MemoryLink) -> None:
        self.links.add(link)
        try:
            # an error in a conversation ends only its own link
            with contextlib.suppress(Exception):
                await self._talk(link.there, link)
        finally:
            self.links.discard(link)
            link.close()
