"""What an exchange with two neighbours costs on loopback, beside a bare gRPC stream over TLS of the
same bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import yaml
from stacked_step import machine_facts, table

from dlora.identity.federation import FederationFile, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.net.grpc import GrpcNetwork
from dlora.wire.frame import Link
from dlora.wire.peer.codec import PEERS
from dlora.wire.peer.frames import MAX_CHUNK_BYTES, Chunk

MESSAGE_BYTES, NEIGHBOURS, REPEATS = 20_000_000, ("b", "c"), 7
MAX_RATIO, MAX_FRAMING = 2.5, 0.01  # what the project promises
MESSAGE = bytes(range(256)) * (MESSAGE_BYTES // 256)
PIECES = [
    MESSAGE[offset : offset + MAX_CHUNK_BYTES] for offset in range(0, len(MESSAGE), MAX_CHUNK_BYTES)
]


class Exchange:
    """Every link carries the message both ways at once, again and again, when told to."""

    def __init__(self) -> None:
        # both ends of each link, and the clock
        self.begin = asyncio.Barrier(2 * len(NEIGHBOURS) + 1)
        self.end = asyncio.Barrier(2 * len(NEIGHBOURS) + 1)

    async def talk(self, _: str, link: Link) -> None:
        """One end's part."""

        async def say() -> None:
            for number, piece in enumerate(PIECES):
                await link.send(Chunk("round-000000", number * MAX_CHUNK_BYTES, piece))

        async def hear() -> None:
            for _ in PIECES:
                await link.receive()

        while True:
            await self.begin.wait()
            await asyncio.gather(say(), hear())
            await self.end.wait()

    async def seconds(self) -> float:
        """One exchange over all links."""
        await self.begin.wait()
        began_at = time.perf_counter()
        await self.end.wait()
        return time.perf_counter() - began_at


async def dlora_links(folder: Path) -> AsyncIterator[float]:
    """Seconds of each exchange over GrpcNetwork; the last figure is the share of bytes that framing
    adds.
    """
    exchange, path = Exchange(), folder / "federation.yaml"
    path.write_text(
        federation_text(
            [new_identity(name, None, "peer", folder)[1] for name in ("a", *NEIGHBOURS)]
        )
    )
    networks = {}
    for name in ("a", *NEIGHBOURS):
        federation = FederationFile(path)
        identity = Identity.load(name, folder / f"{name}.key", federation.current)
        neighbours = NEIGHBOURS if name == "a" else ("a",)
        networks[name] = GrpcNetwork(
            identity, federation, neighbours, "127.0.0.1:0" if name == "a" else None, PEERS, print
        )
    async with asyncio.TaskGroup() as tasks:
        serving = [tasks.create_task(network.serve(exchange.talk)) for network in networks.values()]
        await networks["a"].bound.wait()
        tree = yaml.safe_load(path.read_text())
        tree["members"][0]["address"] = f"127.0.0.1:{networks['a'].port}"
        path.write_text(yaml.safe_dump(tree))
        for _ in range(REPEATS):
            yield await exchange.seconds()
        sent = sum(networks["a"].traffic.sent_bytes.values())
        yield sent / (REPEATS * len(NEIGHBOURS) * len(MESSAGE)) - 1
        for task in serving:
            task.cancel()


async def bare_streams(folder: Path) -> AsyncIterator[float]:
    """Seconds of each exchange over grpc.aio with mutual TLS and its own settings, nothing else:
    bytes in, bytes out.
    """
    key = (folder / "a.key").read_bytes()
    at = key.index(b"-----BEGIN CERTIFICATE")
    pair = (key[:at], key[at:])

    begin, end = (asyncio.Barrier(2 * len(NEIGHBOURS) + 1) for _ in range(2))

    async def talk(
        stream: grpc.aio.StreamStreamCall[bytes, bytes] | grpc.aio.ServicerContext[bytes, bytes],
    ) -> None:
        async def say() -> None:
            for piece in PIECES:
                await stream.write(piece)

        async def hear() -> None:
            for _ in PIECES:
                await stream.read()

        for _ in range(REPEATS):
            await begin.wait()
            await asyncio.gather(say(), hear())
            await end.wait()

    async def handle(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await talk(context)

    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(handle)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("bare", {"Talk": handler})]
    )
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([pair], pair[1], require_client_auth=True)
    )
    await server.start()

    async def dial() -> None:
        # A local pool, else both channels share one connection and with it one TLS stream.
        options = [("grpc.ssl_target_name_override", "a"), ("grpc.use_local_subchannel_pool", 1)]
        credentials = grpc.ssl_channel_credentials(pair[1], *pair)
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream("/bare/Talk")()
            await talk(call)

    async with asyncio.TaskGroup() as tasks:
        for _ in NEIGHBOURS:
            tasks.create_task(dial())
        for _ in range(REPEATS):
            await begin.wait()
            began_at = time.perf_counter()
            await end.wait()
            yield time.perf_counter() - began_at
    await server.stop(None)


async def measure() -> None:
    """A B A B ..., so that both meet the same machine; the first pair warms up."""
    with tempfile.TemporaryDirectory() as name:
        links, streams = dlora_links(Path(name)), bare_streams(Path(name))
        pairs = [(await anext(links), await anext(streams)) for _ in range(REPEATS)][1:]
        framing = await anext(links)
        async for _ in links:
            pass
        async for _ in streams:
            pass
    ratio = statistics.median(link / stream for link, stream in pairs)
    moved_mib = 2 * len(NEIGHBOURS) * len(MESSAGE) / 2**20
    rows = [
        [label, f"{1000 * seconds:.0f}", f"{moved_mib / seconds:.0f}"]
        for label, seconds in [
            ("dlora's links", statistics.median(link for link, _ in pairs)),
            ("bare gRPC streams", statistics.median(stream for _, stream in pairs)),
        ]
    ]
    print(machine_facts())
    print(
        f"{len(MESSAGE) / 1e6:.0f} MB each way with {len(NEIGHBOURS)} neighbours, all ends in one"
        f" process, {len(pairs)} pairs\n"
    )
    print(table(["", "ms, median", "MiB/s, all four ways"], rows))
    print(f"\nRatio {ratio:.2f} (median of pairs), target at most {MAX_RATIO}. ", end="")
    print(f"Framing {100 * framing:.4f} % of the bytes, target below {100 * MAX_FRAMING:g} %.")


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    asyncio.run(measure())


if __name__ == "__main__":
    main()
