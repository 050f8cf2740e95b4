"""Schedules with neighbours: laws 5 and 8 for peers that have different units active, and what is mixed, kept and exported."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_simulate import assert_identical, factors_of, optimizer_of, stop_after, story
from world import Signer

import dlora
from dlora.config import Config
from dlora.decentralized import gossip, mixing
from dlora.decentralized.ledger import Ledger, Message, round_of
from dlora.net.memory import MemoryHub
from dlora.programs.messages import message_bytes, message_sizes
from dlora.programs.peer_run import RUN, PeerRun
from dlora.programs.plan import edge_bytes
from dlora.programs.plan_schedule import sent_names
from dlora.programs.prepare import manifest_text, prepare
from dlora.programs.run_folder import RunFolder
from dlora.runlog import RunLog, read_log

MakeConfig = Callable[..., Config]
NAMES = ("north", "east", "south")
KR: dict[str, Any] = {"kind": "kr", "period": 5, "warmup_steps": 6, "active_fraction": 0.35, "rewarm_steps": 2}
RANDOM: dict[str, Any] = {"kind": "random", "period": 3, "active_fraction": 0.3}


def federation(make_config: MakeConfig, schedule: dict[str, Any], num_peers: int = 3, /, **overrides: Any) -> Config:
    """Peers in a line with rows of their own; four rounds of four local steps."""
    members = list(NAMES[:num_peers])
    keys: dict[str, Any] = {"train.rounds": 4, "train.local_steps": 4, "train.learning_rate": 2e-2, "eval_every": 0}
    keys |= {"lora.target_modules": ["query", "key", "dense"], "peers.count": None, "peers.members": members}
    keys |= {"peers.topology": {"kind": "edges", "edges": list(itertools.pairwise(members))}, "schedule": schedule}
    config = make_config(**keys | overrides)
    folder = Path(config.output_dir).parent
    train = {name: str(tiny.write_rows(folder / f"{name}.jsonl", 16, start=20 * index)) for index, name in enumerate(members)}
    section = config.data.model_copy(update={"train": train, "labels": ("0", "1")})
    return Config.parse(config.model_dump() | {"data": section.model_dump() | {"partition": {"kind": "files"}}})


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


class Gated(PeerRun):
    """Dies before the local steps of round number ``gate``, once everybody is there."""

    gate, here = -1, 0

    async def _train(self, number: int, names: frozenset[str]) -> frozenset[str]:
        if number == self.gate:
            Gated.here += 1
            await asyncio.Event().wait()
        return await super()._train(number, names)


class Peers:
    """Real peers but for the wire, which is in memory; they train, exchange and commit in one process."""

    def __init__(self, config: Config, folder: Path) -> None:
        members = config.peers.members or ()
        self.configs = {name: config.model_copy(update={"output_dir": str(folder / name)}) for name in members}
        self.lengths: dict[str, dict[int, int]] = {name: {} for name in members}
        self.bytes: dict[str, int] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, gate: int = -1, resume: bool = False) -> None:
        """All rounds, or those before number ``gate``."""
        Gated.gate, Gated.here = gate, 0
        asyncio.run(asyncio.wait_for(self._all(resume), 60))

    async def _all(self, resume: bool) -> None:
        names = list(self.configs)
        edges = {name: names[max(0, at - 1) : at] + names[at + 1 : at + 2] for at, name in enumerate(names)}
        hub = MemoryHub(edges, redial_s=0.01)
        lives = []
        for name, config in self.configs.items():
            prepared = prepare(config, own=name, resume=resume)
            manifest = prepared.manifest | {"rounds": config.train.rounds}
            folder = RunFolder.resume(config, manifest_text(manifest)) if resume else RunFolder.create(config)
            prepared.keep_frame()
            ledger: Any = Recorded(folder.path / "exchange")
            network: Any = hub.network(name)  # in memory where a peer's own is gRPC's
            log, latest = RunLog(folder.log_path), folder.latest(RUN)
            peer = Gated(name, prepared, manifest, folder, log, ledger, network, Signer(name), lambda: False, latest)
            lives.append(asyncio.create_task(self._live(peer, ledger, edges[name])))
        while Gated.here < len(names) and not all(life.done() for life in lives):
            await asyncio.sleep(0.01)
        for life in lives:
            life.cancel()
        for ended in await asyncio.gather(*lives, return_exceptions=True):
            assert ended is None or isinstance(ended, asyncio.CancelledError), ended

    async def _live(self, peer: PeerRun, ledger: Recorded, neighbours: list[str]) -> None:
        try:
            average, num_peers = await peer.live(neighbours)
            assert num_peers == len(self.configs)
            self.results[peer.name] = peer.finish(average, num_peers)
        finally:
            self.lengths[peer.name] |= ledger.lengths
            self.bytes[peer.name] = peer._bytes_on_wire()
            peer.log.close()
            ledger.close()

    def active(self, name: str) -> list[tuple[int, list[int]]]:
        events = read_log(Path(self.configs[name].output_dir, "log.jsonl"))
        return [(event["step"], event["units"]) for event in events if event["event"] == "active"]

    def adapter(self, name: str, which: str) -> dict[str, torch.Tensor]:
        return load_file(Path(self.configs[name].output_dir, which, "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("schedule", "more"),
    [
        ({**KR, "on_kill": "drop"}, {}),
        ({**RANDOM, "on_kill": "drop"}, {"lora.placement": "core"}),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [
                ({**KR, "on_kill": "hand-off"}, {}),
                (RANDOM, {}),
                (KR, {"peers.rule": "ffa"}),
                (RANDOM, {"peers.rule": "alternate"}),
            ]
        ),
    ],
)
def test_peers_are_their_simulation_and_send_what_it_counts(
    make_config: MakeConfig, tmp_path: Path, schedule: dict[str, Any], more: dict[str, Any]
) -> None:
    """Laws 5 and 8; sets change in the middle of rounds."""
    config = federation(make_config, schedule, **more)
    result = dlora.simulate(config)["runs"]["dec-lora"]
    peers = Peers(config, tmp_path / "peers")
    peers.run()
    prepared = prepare(config)
    together = factors_of(config)
    for index, name in enumerate(NAMES):
        own = factors_of(peers.configs[name])
        for part in ("lora_A", "lora_B", "lora_M", "classifier"):
            tensors = [key for key in own if part in key]
            moved = [(together[key][index] - prepared.model.initial[key]).flatten() for key in tensors]
            off = [(together[key][index] - own[key][0]).flatten() for key in tensors]
            assert not tensors or torch.cat(off).norm() <= 1e-4 * torch.cat(moved).norm(), (name, part)
        events = [event for event in read_log(Path(config.output_dir, "log.jsonl")) if event["event"] == "active"]
        assert peers.active(name) == [(event["step"], event["units"]) for event in events if event["peer"] == name]
        assert len(peers.active(name)) > 3
        for which in ("consensus", f"peers/{name}"):
            simulated = load_file(Path(config.output_dir, which, "adapter_model.safetensors"))
            written = peers.adapter(name, which)
            assert {key for key in written if not written[key].any()} == {key for key in simulated if not simulated[key].any()}
            off = [(tensor - simulated[key]).flatten() for key, tensor in written.items() if ".lora_A." not in key]
            assert torch.cat(off).norm() <= 1e-4 * torch.cat([simulated[key].flatten() for key in written]).norm()
        assert peers.results[name]["adapter_fraction"] < 0.4
    degree = {"north": 1, "east": 2, "south": 1}
    counted = {name: degree[name] * sum(lengths.values()) for name, lengths in peers.lengths.items()}
    assert result["bytes_on_wire"] == sum(counted.values())
    full = message_bytes(prepared, "round-000000")
    assert sum(counted.values()) < 0.75 * 4 * 4 * full  # the head, and changes within a round, go on top of the fraction
    messages = partial(message_bytes, prepared, "round-000000")
    names = sent_names(prepared, messages)
    most = sum(degree[name] * messages(sent) for name, rounds in zip(NAMES, names, strict=True) for sent in rounds)
    assert result["bytes_on_wire"] == most if schedule["kind"] == "random" else result["bytes_on_wire"] <= most < 16 * full
    planned = edge_bytes(prepared)
    for index, name in enumerate(NAMES):
        bound = sum(count for edge, count in planned.items() if index in edge)
        assert peers.bytes[name] < 1.02 * bound
        assert schedule["kind"] == "kr" or peers.bytes[name] > 0.98 * bound


def test_sets_differ_yet_the_mean_is_kept_and_what_is_dropped_is_zero(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kr by each one's scores: one mix moves nobody's tensors but the senders', and the mean over all stays where it was."""
    config = federation(make_config, {**KR, "on_kill": "drop"})
    prepared = prepare(config)
    seen: list[Any] = []
    original = mixing.mix

    def watched(factors: Any, sent: Any, matrix: Any, committed: Any, names: Any) -> None:
        before = {name: tensor.clone() for name, tensor in factors.items()}
        original(factors, sent, matrix, committed, names)
        for name, tensor in factors.items():
            torch.testing.assert_close(tensor.mean(0), before[name].mean(0), rtol=0, atol=3e-7)  # float32
            for peer in range(len(NAMES)):
                assert name in names[peer] or torch.equal(tensor[peer], before[name][peer])
        seen.append(names)

    monkeypatch.setattr(gossip, "mix", watched)
    dlora.simulate(config)
    assert len(seen) == 4
    assert any(len({*map(frozenset, names)}) > 1 for names in seen)  # neighbours with different sets
    assert all("classifier.weight" in held for names in seen for held in names)
    events = [event for event in read_log(Path(config.output_dir, "log.jsonl")) if event["event"] == "active"]
    last = {event["peer"]: event["units"] for event in events}
    kept, mean = factors_of(config), load_file(Path(config.output_dir, "consensus/adapter_model.safetensors"))
    for number, unit in enumerate(prepared.units):
        for module in unit.modules:
            stands = torch.tensor([number in last[name] for name in NAMES])
            function = kept[f"{module}.lora_B"] * stands.view(-1, 1, 1)
            torch.testing.assert_close(mean[f"base_model.model.{module}.lora_B.weight"], function.mean(0))
            for index, name in enumerate(NAMES):
                own = load_file(Path(config.output_dir, "peers", name, "adapter_model.safetensors"))
                assert torch.equal(own[f"base_model.model.{module}.lora_B.weight"], function[index])
    assert any(
        kept[f"{module}.lora_B"].any()
        for number, unit in enumerate(prepared.units)
        for module in unit.modules
        if number not in last["north"]
    )  # what is left out is kept, not lost


def test_a_resumed_simulation_is_the_uninterrupted_one(make_config: MakeConfig, tmp_path: Path) -> None:
    config = federation(make_config, {**KR, "on_kill": "drop"}, save_every=1)
    whole, broken = (config.model_copy(update={"output_dir": str(tmp_path / kind)}) for kind in ("whole", "broken"))
    dlora.simulate(whole)
    with pytest.raises(dlora.Interrupted):
        dlora.simulate(broken, stop=stop_after(2))
    dlora.simulate(broken, resume=True)
    assert_identical(factors_of(broken), factors_of(whole))
    assert_identical(optimizer_of(broken), optimizer_of(whole))
    assert story(broken) == story(whole)


def test_peers_that_stop_and_go_on_end_as_if_they_had_not(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two of them: with more neighbours the order in which edges are decided, and so the rounding, is chance."""
    config = federation(make_config, {**KR, "on_kill": "drop"}, 2)
    whole, broken = Peers(config, tmp_path / "whole"), Peers(config, tmp_path / "broken")
    whole.run()
    broken.run(gate=2)
    assert not broken.results
    broken.run(resume=True)
    for name in NAMES[:2]:
        assert_identical(factors_of(broken.configs[name]), factors_of(whole.configs[name]))
        assert_identical(optimizer_of(broken.configs[name]), optimizer_of(whole.configs[name]))
        assert_identical(broken.adapter(name, "consensus"), whole.adapter(name, "consensus"))
        assert broken.active(name) == whole.active(name)
    assert broken.lengths == whole.lengths


def test_who_catches_up_draws_with_the_others_again_and_keeps_its_scores(make_config: MakeConfig, tmp_path: Path) -> None:
    config = federation(make_config, {**KR, "kind": "random"}).model_copy(update={"output_dir": str(tmp_path / "here")})
    prepared = prepare(config, own="north")
    made: list[PeerRun] = []
    opened: list[Any] = []
    for folder in ("late", "there"):
        log, ledger = RunLog(tmp_path / f"{folder}.jsonl"), Ledger(tmp_path / folder)
        opened += [log, ledger]
        arguments: Any = ("north", prepared, {}, RunFolder(tmp_path / folder), log, ledger, None, None, lambda: False, None)
        made.append(PeerRun(*arguments))
    late, there = made
    late.training.round(0, frozenset(late.training.trained))
    utility = [*late.schedules.each[0].utility]
    assert late.training.participants.optimizer_state() and any(utility)
    late._skip(3)
    for number in range(4):
        there.training.round(number, frozenset(there.training.trained))
    assert late.schedules.each[0].active == there.schedules.each[0].active
    assert late.schedules.each[0].utility == utility and not late.training.participants.optimizer_state()
    late.training.round(4, frozenset(late.training.trained))
    assert late.training.participants.optimizer_state()
    for file in opened:
        file.close()


def test_peers_must_agree_on_the_schedule_and_sizes_are_bounded(make_config: MakeConfig) -> None:
    config = federation(make_config, KR)
    prepared = prepare(config)
    assert prepared.manifest["schedule"] == json.loads(config.schedule.model_dump_json(exclude_none=True))
    plain = dataclasses.replace(prepared, config=config.model_copy(update={"schedule": type(config.schedule)()}))
    full = message_bytes(prepared, "round-000003")
    assert message_sizes(plain, "round-000003") == range(full, full + 1)
    assert message_sizes(prepared, "round-000003") == range(1, full + 1)
    for kind in (plain, prepared):
        assert message_sizes(kind, "sum") == range(message_bytes(kind, "sum"), message_bytes(kind, "sum") + 1)
        assert not message_sizes(kind, "round-000004") and not message_sizes(kind, "weights")


def test_the_baselines_beside_it_are_plain(make_config: MakeConfig) -> None:
    config = federation(make_config, RANDOM, **{"compare": ["fedavg"], "train.rounds": 1})
    runs = dlora.simulate(config)["runs"]
    assert runs["fedavg"]["bytes_on_wire"] == 6 * message_bytes(prepare(config), "round-000000")
    assert "adapter_fraction" in runs["dec-lora"] and "adapter_fraction" not in runs["fedavg"]
