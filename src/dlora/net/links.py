"""The links of one participant, one with each partner: which of two links stays, and its frames.

Two participants may dial each other at the same time. When there are two links, the one dialled by
the participant with the smaller name stays; when the same participant dialled both, the newer one
stays. Both ends use the same rule, so exactly one link stays. The conversation over a new link
begins after the conversation over the old link has returned.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from dlora.net import options
from dlora.net.grpc_link import ENDED, GrpcLink
from dlora.net.options import FEW_BYTES, FIRST_FRAME_S, FLUSH_S
from dlora.net.partners import Partners
from dlora.net.rates import Rate, Told
from dlora.net.transport import LinkDown, Talk, Traffic
from dlora.wire.frame import FrameError, FrameKind

FOR_EVER_S = 1e6


class Links:
    """All current links. Set ``talk`` before the first link."""

    talk: Talk

    def __init__(
        self, partners: Partners, kind: FrameKind, on_refused: Callable[[str], object]
    ) -> None:
        self.partners, self.kind, self.traffic = partners, kind, Traffic()
        self._tell_refused, self._told = on_refused, Told()
        self._links: dict[str, GrpcLink] = {}
        self._unlinked = {name: asyncio.Event() for name in partners.dialled}
        for unlinked in self._unlinked.values():
            unlinked.set()
        # for each partner a lock, so that there is one conversation at a time
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._paces: defaultdict[str, Rate] = defaultdict(
            lambda: Rate(kind.frames_per_s, kind.frames_at_once, FOR_EVER_S)
        )

    def __contains__(self, name: str) -> bool:
        return name in self._links

    async def unlinked(self, name: str) -> None:
        """Wait until there is no link with this neighbour, which must be one that is dialled."""
        await self._unlinked[name].wait()

    def refused(self, reason: str) -> None:
        """Report a refused caller, or a link that was ended because of what came over it."""
        line = self._told.line(reason, asyncio.get_running_loop().time())
        if line is not None:
            self._tell_refused(line)

    async def keep_trusted(self) -> None:
        """End the link of every member whose certificates in the federation file have changed.

        A member without certificates there any more loses its link too. Runs until cancelled.
        """
        while True:
            for name, link in [*self._links.items()]:
                if self.partners.trusted(name) != link.trusted and not link.is_closed:
                    link.close()
                    self.refused(f"{name}: its certificates in the federation file have changed")
            await asyncio.sleep(options.RELOAD_S)

    def take(self, link: GrpcLink) -> bool:
        """Make this the neighbour's link if the rule at the top of this file allows it.

        Returns whether it is the neighbour's link now.
        """
        name, old = link.neighbour, self._links.get(link.neighbour)
        if old is not None:
            if old.dialled_by < link.dialled_by:
                return False
            old.close()
        self._links[name] = link
        if name in self._unlinked:
            self._unlinked[name].clear()
        return True

    def forget(self, link: GrpcLink) -> None:
        """Remove a link that has ended or that never began."""
        if self._links.get(link.neighbour) is link:
            del self._links[link.neighbour]
            if link.neighbour in self._unlinked:
                self._unlinked[link.neighbour].set()

    async def converse(self, link: GrpcLink) -> None:
        """Call ``talk`` for a link until it ends. An error in it does not affect other links."""
        name = link.neighbour
        try:
            async with self._turns[name]:
                reading, writing = (
                    asyncio.create_task(self._read(link)),
                    asyncio.create_task(link.write(self.traffic)),
                )
                try:
                    await self.talk(name, link)
                except LinkDown:
                    pass
                except Exception as error:  # a conversation must not take the others with it
                    self.refused(
                        f"{name}: the conversation failed: {type(error).__name__}: {error}"
                    )
                finally:
                    link.outgoing.close()
                    await asyncio.wait({writing}, timeout=FLUSH_S)
                    await link.hang_up()
                    for task in (reading, writing):
                        task.cancel()
                    for failure in await asyncio.gather(reading, writing, return_exceptions=True):
                        if isinstance(failure, Exception):
                            self.refused(
                                f"{name}: the link failed: {type(failure).__name__}: {failure}"
                            )
        finally:
            link.close()
            self.forget(link)

    async def _read(self, link: GrpcLink) -> None:
        """Read frames from the stream into the link, one frame ahead of the conversation.

        Further frames wait in HTTP/2's window, then at the other end.
        """
        name = link.neighbour
        limit_s: float | None = FIRST_FRAME_S
        reason: str | None = None
        try:
            while True:
                async with asyncio.timeout(limit_s):
                    data = await link.stream.read()
                if not isinstance(data, bytes):  # the stream has ended
                    return
                if len(data) < FEW_BYTES and (
                    pause_s := self._paces[name].take(asyncio.get_running_loop().time())
                ):
                    await asyncio.sleep(pause_s)  # the rest waits at the other end
                if link.is_closed:
                    return
                if self.partners.trusted(name) != link.trusted:
                    reason = "its certificates in the federation file have changed"
                    return
                self.traffic.received(name, len(data))
                await link.incoming.put(self.kind.decode(data))
                limit_s = None
        except TimeoutError:
            reason = f"no frame within {FIRST_FRAME_S:g} s"
        except FrameError as error:
            reason = str(error)
        except (*ENDED, LinkDown):
            pass
        finally:
            link.close()
            if reason is not None:
                self.refused(f"{name}: {reason}")
