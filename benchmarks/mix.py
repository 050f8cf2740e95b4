"""What `dlora.Peer.mix` costs with two neighbours on loopback, beside bare gRPC streams over TLS of
the same bytes. Every end is a process of its own; messages lie in memory (/dev/shm), not on a disk.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import grpc
import torch
import yaml
from stacked_step import machine_facts, table
from torch import nn

import dlora
from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from dlora.programs.local import free_ports

NAMES = ("b", "a", "c")  # a line: a has two neighbours
MESSAGE_BYTES, PIECE_BYTES, REPEATS = 20_000_000, 1 << 20, 7
MAX_RATIO = 1.2  # what the project promises


def dlora_end(name: str, folder: Path, begin: Barrier, told: Any) -> None:
    """Mix ``REPEATS`` rounds; tells the seconds of each."""
    values = {f"w{number}": nn.Parameter(torch.ones(500_000)) for number in range(10)}
    peer = dlora.Peer(
        folder / "peers.yaml",
        name=name,
        key=folder / f"{name}.key",
        federation=folder / "federation.yaml",
    )
    with peer.joined(values):
        for _ in range(REPEATS):
            begin.wait()
            began_at = time.perf_counter()
            peer.mix()
            told.put((name, time.perf_counter() - began_at))
        peer.average()


def bare_end(name: str, folder: Path, begin: Barrier, told: Any) -> None:
    """The same bytes both ways over each edge: grpc.aio with mutual TLS, and nothing else."""
    asyncio.run(_bare(name, folder, begin, told))


async def _bare(name: str, folder: Path, begin: Barrier, told: Any) -> None:
    key = (folder / "a.key").read_bytes()
    at = key.index(b"-----BEGIN CERTIFICATE")
    pair = (key[:at], key[at:])
    message = bytes(range(256)) * (MESSAGE_BYTES // 256)
    pieces = [message[o : o + PIECE_BYTES] for o in range(0, len(message), PIECE_BYTES)]
    port = yaml.safe_load((folder / "federation.yaml").read_text())["members"][1]["address"]
    port = int(port.rpartition(":")[2])
    streams: list[Any] = []

    async def exchange(stream: Any) -> None:
        async def say() -> None:
            for piece in pieces:
                await stream.write(piece)

        async def hear() -> None:
            for _ in pieces:
                await stream.read()

        await asyncio.gather(say(), hear())

    async def rounds() -> None:
        for _ in range(REPEATS):
            await asyncio.to_thread(begin.wait)
            began_at = time.perf_counter()
            await asyncio.gather(*(exchange(stream) for stream in streams))
            told.put((name, time.perf_counter() - began_at))

    if name == "a":
        ended = asyncio.Event()

        async def handle(_: object, context: Any) -> None:
            streams.append(context)
            await ended.wait()

        server = grpc.aio.server()
        handler: Any = grpc.stream_stream_rpc_method_handler(handle)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("bare", {"Talk": handler})]
        )
        server.add_secure_port(
            f"127.0.0.1:{port}",
            grpc.ssl_server_credentials([pair], pair[1], require_client_auth=True),
        )
        await server.start()
        while len(streams) < 2:
            await asyncio.sleep(0.01)
        await rounds()
        ended.set()
        await server.stop(5)
        return
    credentials = grpc.ssl_channel_credentials(pair[1], *pair)
    options = [("grpc.ssl_target_name_override", "a")]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        talk: Any = channel.stream_stream("/bare/Talk")
        streams.append(talk(wait_for_ready=True))
        await rounds()


def seconds(end: Callable[..., None], folder: Path) -> list[float]:
    """Seconds of each round at the peer in the middle, without the first."""
    spawned = multiprocessing.get_context("spawn")
    begin, told = spawned.Barrier(len(NAMES)), spawned.Queue()
    ends = [spawned.Process(target=end, args=(name, folder, begin, told)) for name in NAMES]
    for one in ends:
        one.start()
    took = [told.get(timeout=120) for _ in range(REPEATS * len(NAMES))]
    for one in ends:
        one.join(60)
        assert one.exitcode == 0
    return [second for name, second in took if name == "a"][1:]


def federation(folder: Path) -> None:
    """Keys, federation.yaml and peers.yaml of a line of three."""
    members = [
        new_identity(name, f"127.0.0.1:{port}", "peer", folder)[1]
        for name, port in zip(NAMES, free_ports(len(NAMES)), strict=True)
    ]
    (folder / "federation.yaml").write_text(federation_text(members))
    tree = {
        "members": list(NAMES),
        "rounds": REPEATS,
        "topology": {"kind": "edges", "edges": [["b", "a"], ["a", "c"]]},
        "state_dir": str(folder / "state"),
    }
    (folder / "peers.yaml").write_text(yaml.safe_dump(tree))


def main() -> None:
    """Measure both in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each, in turns")
    arguments = parser.parse_args()
    mixed, bare = list[float](), list[float]()
    for _ in range(arguments.pairs):
        for end, into in ((bare_end, bare), (dlora_end, mixed)):
            with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
                federation(Path(folder))
                into += seconds(end, Path(folder))
    print(machine_facts())
    print(f"\n{MESSAGE_BYTES // 10**6} MB each way with 2 neighbours, a process each\n")
    ms = {"Peer.mix": mixed, "bare gRPC streams": bare}
    rows = [[name, f"{1e3 * statistics.median(each):.0f}"] for name, each in ms.items()]
    print(table(["", "ms, median"], rows))
    ratio = statistics.median(mixed) / statistics.median(bare)
    print(f"\nRatio {ratio:.2f} of the medians, target at most {MAX_RATIO}.")


if __name__ == "__main__":
    main()
