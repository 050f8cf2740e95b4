"""The wire between machines: gRPC over mutual TLS 1.3, one stream a link; keeps the contract of
`transport.py`.

Who is at the other end is proved before a link exists. A link ends when the federation file's
certificates for the other end change, and is dialled again with the new ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dlora.identity.federation import FederationFile
from dlora.identity.keys import Identity
from dlora.net import options  # first: it quiets gRPC
from dlora.net.dialling import Dialling
from dlora.net.links import Links
from dlora.net.listener import Listener
from dlora.net.options import SETTLE_S
from dlora.net.partners import Partners
from dlora.net.transport import Talk, Traffic
from dlora.net.watch import Watch
from dlora.wire.frame import FrameKind


class GrpcNetwork:
    """All links of one participant.

    ``neighbours`` are dialled where they have an address; None makes a cloud, which dials nobody,
    lets in whoever has the role device in the federation file as it then is, and answers gRPC's
    health checks on the same port. ``listen`` is HOST:PORT to be dialled at, port 0 for any free
    one, or None to dial only. ``on_refused`` hears, in one line, of everything that was turned away
    or ended for what it sent, as far as it came through TLS; ``on_certificate`` of each that ends
    soon, is over, or is not valid yet. ``kind`` is what the links carry. ``bound`` is set while it
    serves.
    """

    def __init__(
        self,
        identity: Identity,
        federation: FederationFile,
        neighbours: Sequence[str] | None,
        listen: str | None,
        kind: FrameKind,
        on_refused: Callable[[str], object] = lambda reason: None,
        on_certificate: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.identity, self.federation, self.bound = identity, federation, asyncio.Event()
        self._partners = Partners(identity, federation, neighbours)
        self._watch = Watch(identity, on_certificate)
        self._links = Links(self._partners, kind, on_refused)
        self.traffic: Traffic = self._links.traffic
        self._dialling = Dialling(self._partners, self._links, kind, self._watch)
        self._listener = (
            None
            if listen is None
            else Listener(listen, self._partners, self._links, self._dialling, kind)
        )

    @property
    def port(self) -> int | None:
        """The one listened on; None where nothing listens."""
        return (self._listener.port or None) if self._listener is not None else None

    async def serve(self, talk: Talk) -> None:
        """Listen, dial, and talk over every link until cancelled; then let the last frames go.

        Whatever ends a conversation ends its link and nothing else. Raises ConfigError when
        ``listen`` cannot be had.
        """
        self._links.talk = talk
        if self._listener is not None:
            await self._listener.open()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._links.keep_trusted())
                tasks.create_task(self._keep_watching())
                if self._listener is not None:
                    await self._listener.start(tasks)
                self.bound.set()
                for name in self._partners.dialled:
                    tasks.create_task(self._dialling.keep_dialling(name))
                try:
                    await asyncio.Event().wait()
                finally:
                    self.bound.clear()
                    if self._listener is not None:
                        self._listener.take_no_more()
        finally:
            if self._listener is not None:
                await self._listener.stop()
            await asyncio.sleep(SETTLE_S)

    async def _keep_watching(self) -> None:
        while True:
            self._watch.look(self._partners.federation.current, self._partners.names)
            await asyncio.sleep(options.RELOAD_S)
