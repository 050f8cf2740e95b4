"""A cloud and whoever dials it, in memory and over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from dlora.identity.federation import FederationFile, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.net.channel import Channel, Dialler
from dlora.net.grpc import GrpcNetwork
from dlora.net.loop_thread import LoopThread
from dlora.net.memory import MemoryHub
from dlora.net.transport import LinkDown, Network
from dlora.wire.frame import Link
from dlora.wire.split.codec import split_kind
from dlora.wire.split.frames import SplitFrame

LIMIT_S = 10  # for what must happen at once; nothing waits that long


class Cloud:
    """What a cloud does with a link: keeps its channel, and hands what it hears to the test or
    back.
    """

    def __init__(self, max_frame_bytes: int = 1 << 24) -> None:
        self.kind = split_kind(max_bytes=max_frame_bytes)
        self.channels: queue.Queue[tuple[str, Channel]] = queue.Queue()
        self.heard: queue.Queue[tuple[str, SplitFrame]] = queue.Queue()
        self.on_frame: Callable[[str, SplitFrame], object] = lambda name, frame: self.heard.put(
            (name, frame)
        )
        self.refused: list[str] = []

    async def talk(self, name: str, link: Link) -> None:
        channel = Channel(link, self.kind)
        self.channels.put((name, channel))
        await channel.carry(lambda frame: self.on_frame(name, frame))

    def channel(self) -> Channel:
        return self.channels.get(timeout=LIMIT_S)[1]


class Stuck:
    """A link whose other end takes nothing, and from which nothing comes any more."""

    async def send(self, frame: bytes) -> None:
        await asyncio.sleep(LIMIT_S)

    async def receive(self) -> bytes:
        raise LinkDown("the link has ended")


class InMemory:
    def __init__(self, folder: Path, loop: LoopThread) -> None:
        self.loop, self.cloud = loop, Cloud()
        self.hub = MemoryHub(
            {"box": ["phone"], "phone": ["box"]}, redial_s=0.01, kind=self.cloud.kind.as_bytes
        )
        self.start()

    def start(self) -> None:
        self.serving = self.loop.start(self.hub.network("box").serve(self.cloud.talk))

    def network(self, name: str) -> Network:
        return self.hub.network(name)


class Loopback:
    """A cloud, two devices and a peer; the federation file lists those named and says where the
    cloud is.
    """

    def __init__(self, folder: Path, loop: LoopThread, listed: str = "box phone") -> None:
        self.folder, self.loop, self.cloud, self.listed = folder, loop, Cloud(), listed.split()
        roles: dict[str, Any] = {
            "box": "cloud",
            "phone": "device",
            "tablet": "device",
            "friend": "peer",
        }
        for name, role in roles.items():
            new_identity(name, None, role, folder)
        self.path, self.address = folder / "federation.yaml", "127.0.0.1:1"
        self.write()
        self.start()

    def start(self) -> None:
        """The cloud, on any free port, which the federation file then names."""
        federation = FederationFile(self.path)
        identity = Identity.load("box", self.folder / "box.key", federation.current)
        kind = self.cloud.kind.as_bytes
        network = GrpcNetwork(
            identity, federation, None, "127.0.0.1:0", kind, self.cloud.refused.append
        )
        self.serving = self.loop.start(network.serve(self.cloud.talk))
        self.loop.start(network.bound.wait()).result(LIMIT_S)
        self.address = f"127.0.0.1:{network.port}"
        self.write()

    def write(self, **roles: str) -> None:
        members = [
            yaml.safe_load((self.folder / f"{name}.member.yaml").read_text())
            for name in self.listed
        ]
        for member in members:
            member["role"] = roles.get(member["name"], member["role"])
            member["address"] = self.address if member["role"] == "cloud" else None
        new = self.path.with_suffix(".new")
        new.write_text(yaml.safe_dump({"members": members}))
        new.replace(self.path)

    def network(self, name: str) -> GrpcNetwork:
        """A device's. A stranger's own federation file lists it; the cloud's does not."""
        own = self.folder / f"{name}-federation.yaml"
        own.write_text(
            federation_text([self.folder / f"{member}.member.yaml" for member in ("box", name)])
        )
        tree = yaml.safe_load(own.read_text())
        for member in tree["members"]:
            member["address"] = self.address if member["name"] == "box" else None
        own.write_text(yaml.safe_dump(tree))
        federation = FederationFile(self.path if name in self.listed else own)
        identity = Identity.load(name, self.folder / f"{name}.key", federation.current)
        return GrpcNetwork(identity, federation, ["box"], None, kind=self.cloud.kind.as_bytes)


@contextlib.contextmanager
def dialling(net: InMemory | Loopback, name: str = "phone") -> Iterator[Dialler]:
    dialler = Dialler(net.network(name), net.loop, net.cloud.kind)
    try:
        yield dialler
    finally:
        dialler.close()


def give_up_after(limit_s: float) -> Callable[[], bool]:
    end = time.monotonic() + limit_s
    return lambda: time.monotonic() > end
