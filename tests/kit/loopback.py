"""Two members linked by real TLS on loopback, and how a test runs them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import yaml

from dlora.identity.federation import FederationFile, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.net.grpc import GrpcNetwork
from dlora.wire.peer.codec import PEERS


class Loopback:
    """Each end that listens takes a free port and writes it into the federation file, which the
    other takes up.
    """

    def __init__(self, folder: Path, listening: str = "ab", names: str = "ab") -> None:
        self.folder, self.listening, self.names, self.path = (
            folder,
            listening,
            names,
            folder / "federation.yaml",
        )
        self.refused: list[str] = []
        members = [new_identity(name, None, "peer", folder)[1] for name in names]
        self.path.write_text(federation_text(members))

    def network(self, name: str, **overrides: Any) -> GrpcNetwork:
        federation = FederationFile(self.path)
        arguments: dict[str, Any] = {
            "identity": Identity.load(name, self.folder / f"{name}.key", federation.current),
            "federation": federation,
            "neighbours": [other for other in self.names if other != name],
            "listen": "127.0.0.1:0" if name in self.listening else None,
            "kind": PEERS,
            "on_refused": self.refused.append,
        }
        return GrpcNetwork(**arguments | overrides)

    @contextlib.asynccontextmanager
    async def serve(self, name: str, talk: Any) -> AsyncIterator[GrpcNetwork]:
        network = self.network(name)
        async with running(network.serve(talk)):
            await network.bound.wait()
            if network.port is not None:
                self.address(name, f"127.0.0.1:{network.port}")
            yield network

    def address(self, name: str, address: str) -> None:
        tree = yaml.safe_load(self.path.read_text())
        for member in tree["members"]:
            if member["name"] == name:
                member["address"] = address
        new = self.path.with_suffix(".new")
        new.write_text(yaml.safe_dump(tree))
        new.replace(self.path)


@contextlib.asynccontextmanager
async def running(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """A task for the time of the block; its own failure is the block's."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(coroutine)
        yield
        task.cancel()


def run(main: Coroutine[Any, Any, None], limit_s: float = 20) -> None:
    asyncio.run(asyncio.wait_for(main, limit_s))
