"""The listening end: checks each caller and makes a link of each accepted call.

The TLS layer trusts the partners' certificates. The handler then requires TLS 1.3, that the name in
the certificate is a partner's name, and that the federation file lists this certificate for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import defaultdict

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from dlora.errors import ConfigError
from dlora.net import options
from dlora.net.dialling import ACCEPTED, Dialling
from dlora.net.doorman import Doorman
from dlora.net.grpc_link import METHOD, Context, GrpcLink
from dlora.net.links import FOR_EVER_S, Links
from dlora.net.options import (
    COURTESY_S,
    DOOR_S,
    FLUSH_S,
    LINKS_AT_ONCE,
    LINKS_PER_S,
    MAX_STRANGERS,
    QUEUE_S,
    listener_options,
)
from dlora.net.partners import Partners
from dlora.net.rates import Rate
from dlora.wire.frame import FrameKind


class Listener:
    """Listens at ``address``, HOST:PORT; ``port`` is the port in use.

    The listener of a cloud answers gRPC's health checks on the same port.
    """

    def __init__(
        self, address: str, partners: Partners, links: Links, dialling: Dialling, kind: FrameKind
    ) -> None:
        self.address, self.partners, self.links, self.dialling = address, partners, links, dialling
        self.kind, self.port = kind, 0
        self._door, self._health = Doorman(MAX_STRANGERS), health.aio.HealthServicer()
        self._arrivals: defaultdict[str, Rate] = defaultdict(
            lambda: Rate(LINKS_PER_S, LINKS_AT_ONCE, QUEUE_S)
        )
        self._servers: list[grpc.aio.Server] = []  # the last one listens

    async def open(self) -> None:
        """Bind the address. Raises ConfigError when that fails."""
        await self._health.set(self.kind.service, health_pb2.HealthCheckResponse.SERVING)
        self._servers = [self._server(self.address, self.partners.roots())]

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Listen until the tasks are cancelled."""
        self._tasks, self._taking = tasks, True
        await self._servers[0].start()
        tasks.create_task(self._keep_listening())
        tasks.create_task(self._keep_the_door())

    def take_no_more(self) -> None:
        """Make no more links of calls, because the network is stopping."""
        self._taking = False

    async def stop(self) -> None:
        """Stop the servers after the last frames are sent."""
        await asyncio.gather(*(server.stop(FLUSH_S) for server in self._servers))

    async def _keep_listening(self) -> None:
        """Start a new server on the same port whenever the trusted certificates change.

        Links of the old server go on. gRPC's own way, `dynamic_ssl_server_credentials`, cannot be
        used: with it, 200 connections of strangers at once abort or crash the process (1.85.1; the
        test of that in `tests/net/test_attacks.py` shows it in half of its runs).
        """
        roots = self.partners.roots()
        while True:
            await asyncio.sleep(options.RELOAD_S)
            changed = self.partners.roots()
            if changed == roots:
                continue
            roots = b""  # differs from `changed`, so that a failed start is tried again
            # the old server stops listening now and keeps its links
            self._tasks.create_task(self._servers[-1].stop(FOR_EVER_S))
            await asyncio.sleep(0)
            with contextlib.suppress(ConfigError):  # the port is not free yet; try again
                server = self._server(f"{self.address.rpartition(':')[0]}:{self.port}", changed)
                self._servers.append(server)
                await server.start()
                roots = changed

    async def _keep_the_door(self) -> None:
        while True:
            self._door.look(self.port)
            await asyncio.sleep(DOOR_S)

    def _server(self, address: str, roots: bytes) -> grpc.aio.Server:
        identity = self.partners.identity
        pair = (identity.key_pem, identity.certificate_pem)
        credentials = grpc.ssl_server_credentials([pair], roots, require_client_auth=True)
        server = grpc.aio.server(options=listener_options(self.kind.max_bytes))
        handler: grpc.RpcMethodHandler[bytes, bytes]  # no serialisers: bytes as they came
        handler = grpc.stream_stream_rpc_method_handler(self._accept)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(self.kind.service, {METHOD: handler})]
        )
        if self.partners.is_cloud:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            self.port = server.add_secure_port(address, credentials)
        except RuntimeError:
            raise ConfigError(
                f"cannot listen on {address}: another program does, or it is no address of this"
                " machine; stop that program or listen on another HOST:PORT"
            ) from None
        return server

    async def _accept(self, _: object, context: Context) -> None:
        name, reason = self._who(context)
        if reason is not None:
            self.links.refused(f"{context.peer()}: {reason}")
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)
        with self._door.let_in(context.peer()):
            await self._admit(name, context)

    async def _admit(self, name: str, context: Context) -> None:
        """Make a link of a partner's call, as soon as the limit for its calls allows it.

        Two participants that dial each other would get two links. To make that rare, the one with
        the smaller name lets the call wait for up to a second while it dials the caller itself. The
        one with the larger name never waits, so they cannot wait for each other.
        """
        wait_s = self._arrivals[name].take(asyncio.get_running_loop().time())
        if wait_s is None:
            self.links.refused(
                f"{name}: it dials too often, {LINKS_PER_S:g} times a second are taken"
            )
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"at most {LINKS_PER_S:g} links a second"
            )
        await asyncio.sleep(wait_s or 0.0)
        if self.partners.identity.name < name:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COURTESY_S):
                    await self.dialling.attempted(name)
        if not self._taking:  # a partner that dials again at once must not take this for a link
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this end is closing")
        link = GrpcLink(name, name, context, self.kind, self.partners.trusted(name))
        if not self.links.take(link):
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "there is a link already")
        try:
            await context.send_initial_metadata([ACCEPTED])
        except BaseException:
            self.links.forget(link)
            raise
        if not self._taking:
            return
        conversation = self._tasks.create_task(self.links.converse(link))
        try:
            await asyncio.wait({conversation})
        finally:
            # gRPC cancels this task, not the conversation, when the other end has gone
            link.close()

    def _who(self, context: Context) -> tuple[str, str | None]:
        """(the caller's name, why it is refused); the reason is None if it is accepted."""
        facts = {key: next(iter(values), b"") for key, values in context.auth_context().items()}
        name = facts.get("x509_common_name", b"").decode(errors="replace")
        version = facts.get("ssl_tls_version", b"no TLS").decode(errors="replace")
        if version != "TLSv1.3":
            return name, f"{version} instead of TLSv1.3"
        if name not in self.partners.names:  # the certificate is not read
            return name, self.partners.refusal(name, b"")
        der = ssl.PEM_cert_to_DER_cert(facts.get("x509_pem_cert", b"").decode())
        return name, self.partners.refusal(name, der)
