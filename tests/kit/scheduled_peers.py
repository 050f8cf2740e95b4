"""Real peers with a schedule, in one process."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dlora.config.run import Config
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages_on_disk import Message, round_of
from dlora.events.log import read_log
from dlora.net.loop_thread import LoopThread
from dlora.net.memory import MemoryHub, MemoryNetwork
from dlora.run.opening import opened
from dlora.run.place import Place
from dlora.run.real_peer import PeerRun
from dlora.run.site import RUN, Site
from dlora.wire.peer.codec import PEERS
from kit import tiny_models
from kit.virtual_federation import Signer

MakeConfig = Callable[..., Config]
NAMES = ("north", "east", "south")
KR: dict[str, Any] = {
    "kind": "kr",
    "period": 5,
    "warmup_steps": 6,
    "active_fraction": 0.35,
    "rewarm_steps": 2,
}
ALL: dict[str, Any] = {"kind": "all"}
OVERLAP: dict[str, Any] = {"peers.overlap": True}
RANDOM: dict[str, Any] = {"kind": "random", "period": 3, "active_fraction": 0.3}


def federation(
    make_config: MakeConfig, schedule: dict[str, Any], num_peers: int = 3, /, **overrides: Any
) -> Config:
    """Peers in a line with rows of their own; four rounds of four local steps."""
    members = list(NAMES[:num_peers])
    keys: dict[str, Any] = {
        "train.rounds": 4,
        "train.local_steps": 4,
        "train.learning_rate": 2e-2,
        "eval_every": 0,
    }
    keys |= {
        "lora.target_modules": ["query", "key", "dense"],
        "peers.count": None,
        "peers.members": members,
    }
    keys |= {
        "peers.topology": {"kind": "edges", "edges": list(itertools.pairwise(members))},
        "schedule": schedule,
    }
    config = make_config(**keys | overrides)
    folder = Path(config.output_dir).parent
    train = {
        name: str(tiny_models.write_rows(folder / f"{name}.jsonl", 16, start=20 * index))
        for index, name in enumerate(members)
    }
    section = config.data.model_copy(update={"train": train, "labels": ("0", "1")})
    return Config.parse(
        config.model_dump() | {"data": section.model_dump() | {"partition": {"kind": "files"}}}
    )


class Recorded(Ledger):
    """Remembers how long each round's message was."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.lengths: dict[int, int] = {}

    def keep(self, name: str, content: bytes) -> Message:
        kept = super().keep(name, content)
        if (round := round_of(name)) is not None:
            self.lengths[round] = kept.num_bytes
        return kept


class Dead(Exception):
    """This peer's process is gone."""


class Gated(PeerRun):
    """Dies before the local steps of round number ``gate``, once everybody is there."""

    gate, everybody = -1, threading.Barrier(1)

    def _train(self, number: int, names: frozenset[str]) -> frozenset[str]:
        if number == self.gate:
            Gated.everybody.wait(60)
            raise Dead
        return super()._train(number, names)


class Peers:
    """Real peers but for the wire, which is in memory; they train, exchange and commit in one
    process.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        members = config.peers.members or ()
        self.configs = {
            name: config.model_copy(update={"output_dir": str(folder / name)}) for name in members
        }
        self.lengths: dict[str, dict[int, int]] = {name: {} for name in members}
        self.bytes: dict[str, int] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, gate: int = -1, resume: bool = False) -> None:
        """All rounds, or those before number ``gate``."""
        names = list(self.configs)
        Gated.gate, Gated.everybody = gate, threading.Barrier(len(names))
        edges = {
            name: names[max(0, at - 1) : at] + names[at + 1 : at + 2]
            for at, name in enumerate(names)
        }
        hub = MemoryHub(edges, PEERS, redial_s=0.01)  # in memory, where a peer's own is gRPC's
        with (
            contextlib.ExitStack() as folders,
            LoopThread() as loop,
            ThreadPoolExecutor(len(names)) as threads,
        ):
            made = []  # all before one trains: they draw from the same generator
            for name, config in self.configs.items():
                run = folders.enter_context(opened(config, [RUN], own=name, resume=resume))
                ledger: Any = Recorded(run.folder.path / "exchange")
                network = loop.start(_made(hub, name)).result()
                place = Place(
                    name=name,
                    section=config.peers,
                    topology=run.prepared.topology,
                    messages=run.prepared.messages,
                    manifest=run.manifest,
                    ledger=ledger,
                    network=network,
                    signatures=Signer(name),
                    log=run.log,
                    loop=loop,
                )
                peer = Gated(run, Site(run), place)
                made.append((peer, ledger))
            lives = [threads.submit(self._live, *both) for both in made]
            for life in as_completed(lives, timeout=60):  # the first error names the cause
                with contextlib.suppress(Dead):
                    life.result()

    def _live(self, peer: PeerRun, ledger: Recorded) -> None:
        try:
            average, num_peers = peer.live()
            assert num_peers == len(self.configs)
            self.results[peer.name] = peer.finish(average, num_peers)
        finally:
            self.lengths[peer.name] |= ledger.lengths
            self.bytes[peer.name] = peer.tally.cost(peer.seconds)["bytes_on_wire"]
            ledger.close()

    def active(self, name: str) -> list[tuple[int, list[int]]]:
        events = read_log(Path(self.configs[name].output_dir, "log.jsonl"))
        return [(event["step"], event["units"]) for event in events if event["event"] == "active"]

    def adapter(self, name: str, which: str) -> dict[str, torch.Tensor]:
        return load_file(Path(self.configs[name].output_dir, which, "adapter_model.safetensors"))


async def _made(hub: MemoryHub, name: str) -> MemoryNetwork:
    return hub.network(name)
