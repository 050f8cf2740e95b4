"""The network between machines, as `transport.py` defines it: gRPC over mutual TLS 1.3.

Each link is one gRPC stream. The identity of the other end is proved before a link exists. When the
other end's certificates in the federation file change, the link ends and is dialled again with the
new certificates.
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

    - ``neighbours``: the members to dial, if they have an address. None makes a cloud: it dials no
      one, accepts every member that has the role device in the current federation file, and
      answers gRPC's health checks on the same port.
    - ``listen``: HOST:PORT on which to accept links (port 0: any free port), or None to dial only.
    - ``kind``: the frames that the links carry.
    - ``on_refused``: called with one line for each caller that was refused after TLS, and for each
      link that was ended because of what came over it.
    - ``on_certificate``: called with one line for each certificate that expires soon, has expired,
      or is not valid yet.

    ``bound`` is set while the network serves.
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
        """The port on which it listens; None when it does not listen."""
        return (self._listener.port or None) if self._listener is not None else None

    async def serve(self, talk: Talk) -> None:
        """Listen, dial, and call ``talk`` for each link until cancelled; then send the last frames.

        An error in one conversation ends only its own link. Raises ConfigError when it cannot
        listen at ``listen``.
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
