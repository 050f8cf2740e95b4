"""A cloud that serves over real TLS in this process, and its devices' first words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlora.config.cloud import CloudConfig
from dlora.identity.federation import Federation, FederationFile, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.net.channel import Channel, Dialler
from dlora.net.grpc import GrpcNetwork
from dlora.net.loop_thread import LoopThread
from dlora.programs.cloud import Summary, cloud
from dlora.split.agreement import proposal_text
from dlora.split.device.half import Half
from dlora.wire.split.codec import split_kind
from dlora.wire.split.frames import Open, Opened, Refused
from kit.call_cli import change
from kit.ports import free_ports
from kit.processes import until

DEVICES = ("phone", "tablet")
PATIENCE_S = 30.0


class Members:
    """A cloud, two devices and a peer with keys in one folder; the cloud's address is free."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        members = [new_identity("hub", self.address, "cloud", folder)[1]]
        members += [new_identity(name, None, "device", folder)[1] for name in DEVICES]
        members += [new_identity("north", "127.0.0.1:7000", "peer", folder)[1]]
        members += [new_identity("attic", None, "cloud", folder)[1]]
        self.federation = folder / "federation.yaml"
        self.federation.write_text(federation_text(members))

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    @contextmanager
    def dialler(self, name: str) -> Iterator[Dialler]:
        """The device's way to the cloud."""
        identity = Identity.load(name, self.key(name), Federation.load(self.federation))
        with LoopThread() as loop:
            network = GrpcNetwork(
                identity, FederationFile(self.federation), ["hub"], None, split_kind().as_bytes
            )
            dialler = Dialler(network, loop, split_kind())
            try:
                yield dialler
            finally:
                dialler.close()


class Serving:
    """What a cloud that runs in a thread has told so far."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.done: Future[Summary]
        self.stop = threading.Event()

    def heard(self, kind: str, **fields: Any) -> list[Any]:
        return [
            event
            for event in [*self.events]
            if event["event"] == kind and fields.items() <= event.items()
        ]

    def wait_for(self, kind: str, **fields: Any) -> Any:
        until(
            lambda: self.heard(kind, **fields) or self.done.done(), f"{kind} {fields}", PATIENCE_S
        )
        assert self.heard(kind, **fields), self.done.result()
        return self.heard(kind, **fields)[0]

    def summary(self) -> Summary:
        """Stop it and wait."""
        self.stop.set()
        return self.done.result(PATIENCE_S)


@contextmanager
def serving(
    members: Members, model: Path, changes: dict[str, Any] | None = None
) -> Iterator[Serving]:
    served, tree = Serving(), {"model": str(model), "device": "cpu"}
    change(tree, changes or {})
    config = CloudConfig.parse(tree)
    key, federation = members.key("hub"), members.federation
    with ThreadPoolExecutor(1) as thread:
        served.done = thread.submit(
            lambda: cloud(
                config,
                name="hub",
                key=key,
                federation=federation,
                listeners=[served.events.append],
                stop=served.stop.is_set,
            )
        )
        try:
            served.wait_for("serving")
            yield served
        finally:
            served.stop.set()


def opened(dialler: Dialler, manifest: str) -> tuple[Channel, Opened | Refused]:
    channel = dialler.dial()
    channel.send(Open(manifest))
    answer = channel.receive(PATIENCE_S)
    assert isinstance(answer, Opened | Refused)
    return channel, answer


def manifest_of(half: Half) -> str:
    return proposal_text(half.facts, half.agreement)
