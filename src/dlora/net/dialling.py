"""Dials every neighbour that has an address, again and again while there is no link with it."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import grpc

from dlora.net import options
from dlora.net.grpc_link import ENDED, METHOD, Call, GrpcLink
from dlora.net.links import Links
from dlora.net.options import DIAL_S, dialler_options
from dlora.net.partners import Partners
from dlora.net.watch import Watch
from dlora.wire.frame import FrameKind

ACCEPTED = ("dlora-link", "accepted")  # the header with which a listener accepts a link


class Dialling:
    """Dials the neighbours. Each attempt trusts only the certificates of the dialled member."""

    def __init__(self, partners: Partners, links: Links, kind: FrameKind, watch: Watch) -> None:
        self.partners, self.links, self.kind = partners, links, kind
        self._watch = watch
        # for each neighbour an event, which is not set during an attempt
        self._attempted = {name: asyncio.Event() for name in partners.dialled}
        for attempted in self._attempted.values():
            attempted.set()
        self._said: dict[str, str] = {}  # name -> why it cannot be dialled, as reported last
        # name -> how many attempts in a row the other end closed during the handshake
        self._hung_up: defaultdict[str, int] = defaultdict(int)

    async def keep_dialling(self, name: str) -> None:
        """Dial until cancelled. While the neighbour does not answer, the pauses grow."""
        pause_s = options.MIN_PAUSE_S
        while True:
            if name in self.links:
                await self.links.unlinked(name)
                pause_s = options.MIN_PAUSE_S
            members = self.partners.federation.current.members
            address = members[name].address if name in members else None
            lived_s = await self._dial(name, address) if address is not None else 0.0
            pause_s = options.MIN_PAUSE_S if lived_s > pause_s else pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, options.MAX_PAUSE_S)

    async def attempted(self, name: str) -> None:
        """Wait until no attempt to dial this neighbour is running."""
        if name in self._attempted:
            await self._attempted[name].wait()

    async def _dial(self, name: str, address: str) -> float:
        """Dial once and talk; returns for how many seconds there was a link."""
        identity, trusted = self.partners.identity, self.partners.trusted(name)
        tls = grpc.ssl_channel_credentials(trusted, identity.key_pem, identity.certificate_pem)
        settings = dialler_options(self.kind.max_bytes, name)
        async with grpc.aio.secure_channel(address, tls, settings) as channel:
            call: Call = channel.stream_stream(f"/{self.kind.service}/{METHOD}")()
            link = GrpcLink(name, identity.name, call, self.kind, trusted)
            self._attempted[name].clear()
            try:
                async with asyncio.timeout(DIAL_S):
                    # the headers of a failed call are empty
                    if ACCEPTED not in list(await call.initial_metadata()):
                        self._explain(name, await call.code(), await call.details())
                        return 0.0
                if not self.links.take(link):
                    return 0.0
            except (*ENDED, TimeoutError):
                return 0.0
            finally:
                self._attempted[name].set()
            self._said.pop(name, None)
            self._hung_up.pop(name, None)
            clock = asyncio.get_running_loop()
            began_at = clock.time()
            await self.links.converse(link)
            return clock.time() - began_at

    def _explain(self, name: str, code: grpc.StatusCode, details: str | None) -> None:
        """Report once why a neighbour cannot be dialled.

        A neighbour that is not running yet is not reported.
        """
        text = ascii(details or "")[:300]
        if "Socket closed" in text:
            self._hung_up[name] += 1
            text = self._watch.hung_up() if self._hung_up[name] == options.HANG_UPS else ""
        elif "CERTIFICATE_VERIFY_FAILED" in text:
            text = (
                f"{name} shows a certificate that the federation file here does not list for it;"
                " compare what `dlora identity show` says of the federation files at both ends"
            )
        elif code is not grpc.StatusCode.PERMISSION_DENIED and "handshake failed" not in text:
            text = ""
        if text and self._said.get(name) != text:
            self._said[name] = text
            self.links.refused(f"dialling {name}: {text}")
