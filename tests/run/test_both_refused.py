"""Devices with neighbours: mistakes that are told before, and certificates in the wrong place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlora.identity.federation import Federation, FederationFile, Role, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.net.grpc import GrpcNetwork
from dlora.wire.frame import FrameKind
from dlora.wire.peer.codec import PEERS
from dlora.wire.split.codec import split_kind
from kit.both_devices import Both
from kit.call_cli import call, change, contents
from kit.ports import free_ports

ModelFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys of a cloud, two devices that listen and a peer, and their federation
    file.
    """
    folder, ports = tmp_path_factory.mktemp("members"), free_ports(4)
    roles: dict[str, Role] = {
        "hub": "cloud",
        "phone": "device",
        "tablet": "device",
        "north": "peer",
    }
    files = [
        new_identity(name, f"127.0.0.1:{port}", role, folder)[1]
        for (name, role), port in zip(roles.items(), ports, strict=True)
    ]
    (folder / "federation.yaml").write_text(federation_text(files))
    return folder


# what has none is told of that first
OWN_FILE = {"data.train": {"north": __file__, "phone": __file__}}
# Program; who; changes to the config; what is said.
MISTAKES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "cloud-as-neighbour": ("device", "phone", {"peers.members": ["phone", "hub"]},
        "peers.members: hub is a cloud in"),
    "peer-beside-device": ("device", "phone", {"peers.members": ["phone", "north"]},
        "with split all members are devices"),
    "device-beside-peer": (
        "peer", "north", {"peers.members": ["north", "phone"], "split": None} | OWN_FILE,
        "without split all members are peers",
    ),
    "device-is-the-cloud": ("device", "phone", {"split.cloud": "tablet"},
        "split.cloud tablet is a device in"),
    "peer-with-a-cloud": ("peer", "north", {"peers.members": ["north", "phone"]} | OWN_FILE,
        "north is a peer in"),
    "device-without-split": ("device", "phone", {"split": None},
        "split is missing; a device needs the name of its cloud"),
    "not-a-member": ("device", "phone", {"peers.members": ["tablet"]},
        "--name phone is not in peers.members (tablet)"),
    "nobody-to-listen-for": ("device --listen 127.0.0.1:7000", "phone", {"peers": {}},
        "--listen is for neighbours to dial"),
    "no-labels": ("device", "phone", {"data.labels": None}, "data.labels is missing"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    mistake: str, members: Path, model_folder: ModelFolder, tmp_path: Path
) -> None:
    words, name, changes, says = MISTAKES[mistake]
    program, *more = words.split()
    both = Both(tmp_path, model_folder("bert"))
    tree = yaml.safe_load(both.config(name).dump())
    tree["data"]["train"].setdefault(name, tree["data"]["train"]["phone"])
    change(tree, changes)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    credentials = [
        "--name",
        name,
        "--key",
        str(members / f"{name}.key"),
        "--federation",
        str(members / "federation.yaml"),
    ]
    before = contents(tmp_path)
    outcome = call(program, tmp_path / "run.yaml", *credentials, *more)
    assert (outcome.exit_code, outcome.out) == (2, ""), outcome
    assert says in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert contents(tmp_path) == before


# Who dials whom, as whose neighbour, carrying what; whether there is a link.
DIALS: dict[str, tuple[str, str, FrameKind, bool]] = {
    "a neighbour, as neighbours do": ("tablet", "phone", PEERS, True),
    "a neighbour, as devices dial clouds": ("tablet", "phone", split_kind().as_bytes, False),
    "the cloud, as neighbours do": ("hub", "phone", PEERS, False),
    "a peer, as neighbours do": ("north", "phone", PEERS, False),
    "a device at the cloud, as devices dial clouds": ("tablet", "hub", split_kind().as_bytes, True),
    "a device at the cloud, as neighbours do": ("tablet", "hub", PEERS, False),
    "a peer at the cloud, as devices dial clouds": ("north", "hub", split_kind().as_bytes, False),
}


@pytest.mark.parametrize("dial", DIALS)
def test_no_certificate_serves_in_anothers_place(
    dial: str, members: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device phone listens for its neighbour tablet, hub for devices, each on its own
    protocol.
    """
    who, whom, kind, links = DIALS[dial]

    def network(
        name: str, neighbours: list[str] | None, listen: str | None, kind: FrameKind
    ) -> GrpcNetwork:
        federation = FederationFile(members / "federation.yaml")
        identity = Identity.load(name, members / f"{name}.key", federation.current)
        return GrpcNetwork(identity, federation, neighbours, listen, kind, refused.append)

    async def main() -> None:
        attempts, linked = asyncio.Queue[None](), asyncio.Event()

        async def talk(name: str, link: Any) -> None:
            linked.set()
            await asyncio.Event().wait()

        address = Federation.load(members / "federation.yaml").member(whom).address
        listener = network(
            whom,
            None if whom == "hub" else ["tablet"],
            address,
            split_kind().as_bytes if whom == "hub" else PEERS,
        )
        dialler = network(who, [whom], None, kind)
        attempt = dialler._dialling._dial

        async def counted(*place: str) -> float:
            lived_s = await attempt(*place)
            attempts.put_nowait(None)
            return lived_s

        monkeypatch.setattr(dialler._dialling, "_dial", counted)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            serving = [tasks.create_task(listener.serve(talk))]
            await listener.bound.wait()
            serving.append(tasks.create_task(dialler.serve(talk)))
            if links:
                await linked.wait()
            else:
                await attempts.get()
                await attempts.get()
            for task in serving:
                task.cancel()
        assert linked.is_set() == links

    refused: list[str] = []
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(main())
