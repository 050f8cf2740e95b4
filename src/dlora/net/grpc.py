"""The wire between machines: gRPC over mutual TLS 1.3, one stream a link; keeps the contract of
`transport.py`.

Who is at the other end is proved before a link exists. A dialler trusts the certificates of the one
member it dials. The listener's TLS layer trusts its neighbours' certificates; then the handler
wants the very certificate that the federation file lists for the name in it, that name to be a
neighbour, and TLS 1.3. A link ends when the file's certificates for the other end change, and is
dialled again with the new ones.

Two ends may dial each other at once. Of two links the one dialled by the smaller name stays, and of
two dialled by the same end the newer one. Both ends judge alike, so one link stays. So that the
other one seldom comes to be at all, the smaller name, while its own attempt is under way, lets a
call wait for up to a second; the larger name never does, so the two cannot wait for each other. A
conversation begins when the one before it, if any, was told that its link is down and has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections import defaultdict
from collections.abc import Callable, Sequence

# else every stranger that is turned away prints a line here
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from dlora.errors import ConfigError
from dlora.identity.federation import FederationFile
from dlora.identity.keys import Identity
from dlora.net.doorman import Doorman
from dlora.net.grpc_link import ENDED, Call, Context, GrpcLink
from dlora.net.options import (
    COURTESY_S,
    DIAL_S,
    DOOR_S,
    FEW_BYTES,
    FIRST_FRAME_S,
    FLUSH_S,
    HANG_UPS,
    LINKS_AT_ONCE,
    LINKS_PER_S,
    MAX_PAUSE_S,
    MAX_STRANGERS,
    MIN_PAUSE_S,
    QUEUE_S,
    RELOAD_S,
    SETTLE_S,
    dialler_options,
    listener_options,
)
from dlora.net.rates import Rate, Told
from dlora.net.transport import LinkDown, Talk, Traffic
from dlora.net.watch import Watch
from dlora.wire.frame import FrameError, FrameKind

_FOR_EVER_S = 1e6
_METHOD = "Talk"
_ACCEPTED = ("dlora-link", "accepted")  # the listener's first headers


class GrpcNetwork:
    """All links of one participant.

    ``neighbours`` are dialled where they have an address; None makes a cloud, which dials nobody,
    lets in whoever has the role device in the federation file as it then is, and answers gRPC's
    health checks on the same port. ``listen`` is HOST:PORT to be dialled at, port 0 for any free
    one, or None to dial only. ``on_refused`` hears, in one line, of everything that was turned away
    or ended for what it sent, as far as it came through TLS; ``on_certificate`` of each that ends
    soon, is over, or is not valid yet. ``kind`` is what the links carry. ``bound`` is set while it
    serves; ``port`` is the one listened on.
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
        self.identity, self.federation, self.listen, self.kind = identity, federation, listen, kind
        self.is_cloud, self._dialled = neighbours is None, tuple(neighbours or ())
        self.traffic = Traffic()
        self.port: int | None = None
        self.bound = asyncio.Event()
        self._tell_refused, self._told = on_refused, Told()
        self._watch, self._door = Watch(identity, on_certificate), Doorman(MAX_STRANGERS)
        self._arrivals: defaultdict[str, Rate] = defaultdict(
            lambda: Rate(LINKS_PER_S, LINKS_AT_ONCE, QUEUE_S)
        )
        self._paces: defaultdict[str, Rate] = defaultdict(
            lambda: Rate(kind.frames_per_s, kind.frames_at_once, _FOR_EVER_S)
        )
        self._links: dict[str, GrpcLink] = {}
        self._unlinked = {name: asyncio.Event() for name in self._dialled}
        self._attempted = {name: asyncio.Event() for name in self._dialled}  # not set while we dial
        # one conversation at a time
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._said: dict[str, str] = {}  # why a neighbour cannot be dialled, told once
        self._hung_up: defaultdict[str, int] = defaultdict(int)  # times on end, in the handshake
        for name in self._dialled:
            self._unlinked[name].set()
            self._attempted[name].set()

    @property
    def neighbours(self) -> tuple[str, ...]:
        """With whom there can be a link now."""
        members = self.federation.current.members.values() if self.is_cloud else ()
        return self._dialled + tuple(member.name for member in members if member.role == "device")

    async def serve(self, talk: Talk) -> None:
        """Until cancelled: listen, dial, and talk over every link; then let the last frames go.

        Whatever ends a conversation ends its link and nothing else. Raises ConfigError when
        ``listen`` cannot be had.
        """
        self._talk, self._health = talk, health.aio.HealthServicer()
        await self._health.set(self.kind.service, health_pb2.HealthCheckResponse.SERVING)
        self._servers = [] if self.listen is None else [self._listener(self.listen, self._roots())]
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._keep_watching())
                if self._servers:
                    await self._servers[0].start()
                    self._tasks.create_task(self._keep_listening())
                    self._tasks.create_task(self._keep_the_door())
                self.bound.set()
                for name in self._dialled:
                    self._tasks.create_task(self._keep_dialling(name))
                try:
                    await asyncio.Event().wait()
                finally:
                    self.bound.clear()
        finally:
            await asyncio.gather(*(server.stop(FLUSH_S) for server in self._servers))
            await asyncio.sleep(SETTLE_S)

    async def _keep_watching(self) -> None:
        """Whoever was struck off the federation file loses the link, silent or not; certificates
        are looked at as well.
        """
        while True:
            for name, link in [*self._links.items()]:
                if self._trusted(name) != link.trusted and not link.is_closed:
                    link.close()
                    self._on_refused(
                        f"{name}: its certificates in the federation file have changed"
                    )
            self._watch.look(self.federation.current, self.neighbours)
            await asyncio.sleep(RELOAD_S)

    def _on_refused(self, reason: str) -> None:
        line = self._told.line(reason, asyncio.get_running_loop().time())
        if line is not None:
            self._tell_refused(line)

    # The listening end

    async def _keep_listening(self) -> None:
        """A new listener on the same port whenever the certificates to trust change; links through
        the one before live on.

        gRPC's own way, `dynamic_ssl_server_credentials`, is no way: 200 strangers' connections at
        once then abort the process or crash it (1.85.1; the test of that in
        `tests/net/test_attacks.py` shows it in half of its runs).
        """
        roots = self._roots()
        while True:
            await asyncio.sleep(RELOAD_S)
            changed = self._roots()
            if changed == roots:
                continue
            roots = b""  # nothing is trusted until the next one listens
            # of its links; it stops listening now
            self._tasks.create_task(self._servers[-1].stop(_FOR_EVER_S))
            await asyncio.sleep(0)
            with contextlib.suppress(ConfigError):  # the port is not free yet: once more
                server = self._listener(
                    f"{str(self.listen).rpartition(':')[0]}:{self.port}", changed
                )
                self._servers.append(server)
                await server.start()
                roots = changed

    async def _keep_the_door(self) -> None:
        while True:
            self._door.look(self.port or 0)
            await asyncio.sleep(DOOR_S)

    def _listener(self, address: str, roots: bytes) -> grpc.aio.Server:
        pair = (self.identity.key_pem, self.identity.certificate_pem)
        credentials = grpc.ssl_server_credentials([pair], roots, require_client_auth=True)
        server = grpc.aio.server(options=listener_options(self.kind.max_bytes))
        handler: grpc.RpcMethodHandler[bytes, bytes]  # no serialisers: bytes as they came
        handler = grpc.stream_stream_rpc_method_handler(self._accept)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(self.kind.service, {_METHOD: handler})]
        )
        if self.is_cloud:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            self.port = server.add_secure_port(address, credentials)
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {address}: another program does, or it is no address of this"
                " machine; stop that program or listen on another HOST:PORT"
            ) from None
        return server

    def _roots(self) -> bytes:
        """Never empty, which gRPC refuses; our own certificate lets nobody in, because we are not
        our neighbour.
        """
        return b"".join(map(self._trusted, self.neighbours)) or self.identity.certificate_pem

    def _trusted(self, name: str) -> bytes:
        """The certificates of whom a link may be with; nothing for others."""
        federation = self.federation.current
        member = federation.members.get(name)
        return (
            b""
            if member is None or (self.is_cloud and member.role != "device")
            else federation.trusted([name])
        )

    async def _accept(self, _: object, context: Context) -> None:
        name, reason = self._who(context)
        if reason is not None:
            self._on_refused(f"{context.peer()}: {reason}")
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)

        with self._door.let_in(context.peer()):
            await self._admit(name, context)

    async def _admit(self, name: str, context: Context) -> None:
        """A neighbour's call becomes its link, in its turn."""
        wait_s = self._arrivals[name].take(asyncio.get_running_loop().time())
        if wait_s is None:
            self._on_refused(
                f"{name}: it dials too often, {LINKS_PER_S:g} times a second are taken"
            )
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"at most {LINKS_PER_S:g} links a second"
            )
        await asyncio.sleep(wait_s or 0.0)
        if self.identity.name < name and name in self._attempted:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COURTESY_S):
                    await self._attempted[name].wait()
        link = GrpcLink(name, name, context, self.kind, self._trusted(name))
        if not self._is_taken(link):
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "there is a link already")
        try:
            await context.send_initial_metadata([_ACCEPTED])
        except BaseException:
            self._forget(link)
            raise
        if not self.bound.is_set():
            return  # we are going
        conversation = self._tasks.create_task(self._converse(link))
        try:
            await asyncio.wait({conversation})
        finally:
            # gRPC cancels this task, not the conversation, when the other end has gone
            link.close()

    def _who(self, context: Context) -> tuple[str, str | None]:
        """The name of the caller, and why it is refused."""
        facts = {key: next(iter(values), b"") for key, values in context.auth_context().items()}
        name = facts.get("x509_common_name", b"").decode(errors="replace")
        version = facts.get("ssl_tls_version", b"no TLS").decode(errors="replace")
        if version != "TLSv1.3":
            return name, f"{version} instead of TLSv1.3"
        if name not in self.neighbours:
            wanted = "device in the federation file" if self.is_cloud else "neighbour"
            return name, f"{name!r} is not a {wanted} of {self.identity.name}"
        der = ssl.PEM_cert_to_DER_cert(facts.get("x509_pem_cert", b"").decode())
        if not self.federation.current.is_listed(name, der):
            return (
                name,
                f"not a certificate that {self.identity.name}'s federation file lists for {name}",
            )
        return name, None

    # The dialling end

    async def _keep_dialling(self, name: str) -> None:
        pause_s = MIN_PAUSE_S
        while True:
            if name in self._links:
                await self._unlinked[name].wait()
                pause_s = MIN_PAUSE_S
            members = self.federation.current.members
            address = members[name].address if name in members else None
            lived_s = await self._dial(name, address) if address is not None else 0.0
            pause_s = MIN_PAUSE_S if lived_s > pause_s else pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def _dial(self, name: str, address: str) -> float:
        """Dial once and talk; seconds that the link lived."""
        trusted = self._trusted(name)
        tls = grpc.ssl_channel_credentials(
            trusted, self.identity.key_pem, self.identity.certificate_pem
        )
        options = dialler_options(self.kind.max_bytes, name)
        async with grpc.aio.secure_channel(address, tls, options) as channel:
            call: Call = channel.stream_stream(f"/{self.kind.service}/{_METHOD}")()
            link = GrpcLink(name, self.identity.name, call, self.kind, trusted)
            self._attempted[name].clear()
            try:
                async with asyncio.timeout(DIAL_S):
                    # of a failed call they are empty
                    if _ACCEPTED not in list(await call.initial_metadata()):
                        self._explain(name, await call.code(), await call.details())
                        return 0.0
                if not self._is_taken(link):
                    return 0.0
            except (*ENDED, TimeoutError):
                return 0.0
            finally:
                self._attempted[name].set()
            self._said.pop(name, None)
            self._hung_up.pop(name, None)
            clock = asyncio.get_running_loop()
            began_at = clock.time()
            await self._converse(link)
            lived_s = clock.time() - began_at
            with contextlib.suppress(*ENDED, TimeoutError):
                # the other end has read everything when it hangs up as well
                async with asyncio.timeout(FLUSH_S):
                    await call.done_writing()
                    await call.code()
            return lived_s

    def _explain(self, name: str, code: grpc.StatusCode, details: str | None) -> None:
        """Say once what stands between us and a neighbour; that it is not there yet is nothing to
        be said.
        """
        text = ascii(details or "")[:300]
        if "Socket closed" in text:
            self._hung_up[name] += 1
            text = self._watch.hung_up() if self._hung_up[name] == HANG_UPS else ""
        elif "CERTIFICATE_VERIFY_FAILED" in text:
            text = (
                f"{name} shows a certificate that the federation file here does not list for it;"
                " compare what `dlora identity show` says of the federation files at both ends"
            )
        elif code is not grpc.StatusCode.PERMISSION_DENIED and "handshake failed" not in text:
            text = ""
        if text and self._said.get(name) != text:
            self._said[name] = text
            self._on_refused(f"dialling {name}: {text}")

    # Both ends

    def _is_taken(self, link: GrpcLink) -> bool:
        """Make this the neighbour's link, or not; see the caption for the rule."""
        name, old = link.neighbour, self._links.get(link.neighbour)
        if old is not None:
            if old.dialled_by < link.dialled_by:
                return False
            old.close()
        self._links[name] = link
        if name in self._unlinked:
            self._unlinked[name].clear()
        return True

    async def _converse(self, link: GrpcLink) -> None:
        """Talk over a link until it ends."""
        name = link.neighbour
        try:
            async with self._turns[name]:
                reading, writing = (
                    asyncio.create_task(self._read(link)),
                    asyncio.create_task(link.write(self.traffic)),
                )
                try:
                    await self._talk(name, link)
                except LinkDown:
                    pass
                except Exception as error:  # a conversation must not take the others with it
                    self._on_refused(
                        f"{name}: the conversation failed: {type(error).__name__}: {error}"
                    )
                finally:
                    link.outgoing.close()
                    await asyncio.wait({writing}, timeout=FLUSH_S)
                    for task in (reading, writing):
                        task.cancel()
                    for failure in await asyncio.gather(reading, writing, return_exceptions=True):
                        if isinstance(failure, Exception):
                            self._on_refused(
                                f"{name}: the link failed: {type(failure).__name__}: {failure}"
                            )
        finally:
            link.close()
            self._forget(link)

    def _forget(self, link: GrpcLink) -> None:
        if self._links.get(link.neighbour) is link:
            del self._links[link.neighbour]
            if link.neighbour in self._unlinked:
                self._unlinked[link.neighbour].set()

    async def _read(self, link: GrpcLink) -> None:
        """Frames into the link, one ahead of the conversation; the rest waits in HTTP/2's window,
        then at the other end.
        """
        name = link.neighbour
        limit_s: float | None = FIRST_FRAME_S
        reason: str | None = None
        try:
            while True:
                async with asyncio.timeout(limit_s):
                    data = await link.stream.read()
                if not isinstance(data, bytes):  # the end
                    return
                if len(data) < FEW_BYTES and (
                    pause_s := self._paces[name].take(asyncio.get_running_loop().time())
                ):
                    await asyncio.sleep(pause_s)  # the rest waits at the other end
                if link.is_closed:
                    return
                if self._trusted(name) != link.trusted:
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
                self._on_refused(f"{name}: {reason}")
