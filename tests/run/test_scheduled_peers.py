"""Schedules with neighbours: laws 5 and 8 for peers that have different units active, and what is
mixed, kept and exported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dlora
from dlora.costs.between_peers import edge_bytes
from dlora.costs.scheduled import sent_names
from dlora.decentralized import gossip, mixing
from dlora.events.log import read_log
from dlora.run.opening import opened
from dlora.run.prepare import prepare
from dlora.run.site import RUN, Site
from kit.run_folders import assert_identical, factors_of, optimizer_of, stop_after, story
from kit.scheduled_peers import (
    ALL,
    KR,
    NAMES,
    OVERLAP,
    RANDOM,
    MakeConfig,
    Peers,
    federation,
)
from kit.updates import KINDS

pytestmark = pytest.mark.usefixtures("no_page")
PATTERNS = {**KINDS["patterns"], "lora.target_modules": ["query", "value", "dense"]}
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("schedule", "more"),
    [
        ({**KR, "on_kill": "drop"}, {}),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [
                ({**RANDOM, "on_kill": "drop"}, {"lora.placement": "core"}),
                ({**KR, "on_kill": "hand-off"}, {}),
                (RANDOM, {}),
                (KR, {"peers.rule": "ffa"}),
                (RANDOM, {"peers.rule": "alternate"}),
                ({**KR, "on_kill": "hand-off"}, PATTERNS),
                ({**KR, "on_kill": "drop"}, KINDS["dora"]),
                ({**RANDOM, "on_kill": "drop"}, KINDS["pissa"]),
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
        for part in ("lora_A", "lora_B", "lora_M", "magnitude", "classifier"):
            tensors = [key for key in own if part in key]
            moved = [
                (together[key][index] - prepared.model.initial[key]).flatten() for key in tensors
            ]
            off = [(together[key][index] - own[key][0]).flatten() for key in tensors]
            assert not tensors or torch.cat(off).norm() <= 1e-4 * torch.cat(moved).norm(), (
                name,
                part,
            )
        events = [
            event
            for event in read_log(Path(config.output_dir, "log.jsonl"))
            if event["event"] == "active"
        ]
        assert peers.active(name) == [
            (event["step"], event["units"]) for event in events if event["peer"] == name
        ]
        assert len(peers.active(name)) > 3
        for which in ("consensus", f"peers/{name}"):
            simulated = load_file(Path(config.output_dir, which, "adapter_model.safetensors"))
            written = peers.adapter(name, which)
            assert {key for key in written if not written[key].any()} == {
                key for key in simulated if not simulated[key].any()
            }
            off = [
                (tensor - simulated[key]).flatten()
                for key, tensor in written.items()
                if ".lora_A." not in key
            ]
            assert (
                torch.cat(off).norm()
                <= 1e-4 * torch.cat([simulated[key].flatten() for key in written]).norm()
            )
        assert peers.results[name]["adapter_fraction"] < 0.4
    degree = {"north": 1, "east": 2, "south": 1}
    counted = {
        name: degree[name] * sum(lengths.values()) for name, lengths in peers.lengths.items()
    }
    assert result["bytes_on_wire"] == sum(counted.values())
    full = prepared.messages.num_bytes("round-000000")
    # the head, and changes within a round, go on top of the fraction
    assert sum(counted.values()) < 0.75 * 4 * 4 * full
    messages = partial(prepared.messages.num_bytes, "round-000000")
    names = sent_names(prepared, messages)
    most = sum(
        degree[name] * messages(sent)
        for name, rounds in zip(NAMES, names, strict=True)
        for sent in rounds
    )
    assert (
        result["bytes_on_wire"] == most
        if schedule["kind"] == "random"
        else result["bytes_on_wire"] <= most < 16 * full
    )
    planned = edge_bytes(prepared)
    for index, name in enumerate(NAMES):
        bound = sum(count for edge, count in planned.items() if index in edge)
        assert peers.bytes[name] < 1.02 * bound
        assert schedule["kind"] == "kr" or peers.bytes[name] > 0.98 * bound


def test_sets_differ_yet_the_mean_is_kept_and_what_is_dropped_is_zero(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kr by each one's scores: one mix moves nobody's tensors but the senders', and the mean over
    all stays where it was.
    """
    config = federation(make_config, {**KR, "on_kill": "drop"})
    prepared = prepare(config)
    seen: list[Any] = []
    original = mixing.mix

    def watched(
        factors: Any, sent: Any, matrix: Any, committed: Any, names: Any, *elsewhere: Any
    ) -> None:
        before = {name: tensor.clone() for name, tensor in factors.items()}
        original(factors, sent, matrix, committed, names, *elsewhere)
        for name, tensor in factors.items():
            # float32
            torch.testing.assert_close(tensor.mean(0), before[name].mean(0), rtol=0, atol=3e-7)
            for peer in range(len(NAMES)):
                assert name in names[peer] or torch.equal(tensor[peer], before[name][peer])
        seen.append(names)

    monkeypatch.setattr(gossip, "mix", watched)
    dlora.simulate(config)
    assert len(seen) == 4
    # neighbours with different sets
    assert any(len({*map(frozenset, names)}) > 1 for names in seen)
    assert all("classifier.weight" in held for names in seen for held in names)
    events = [
        event
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "active"
    ]
    last = {event["peer"]: event["units"] for event in events}
    kept, mean = (
        factors_of(config),
        load_file(Path(config.output_dir, "consensus/adapter_model.safetensors")),
    )
    for number, unit in enumerate(prepared.units):
        for module in unit.modules:
            stands = torch.tensor([number in last[name] for name in NAMES])
            function = kept[f"{module}.lora_B"] * stands.view(-1, 1, 1)
            torch.testing.assert_close(
                mean[f"base_model.model.{module}.lora_B.weight"], function.mean(0)
            )
            for index, name in enumerate(NAMES):
                own = load_file(Path(config.output_dir, "peers", name, "adapter_model.safetensors"))
                assert torch.equal(own[f"base_model.model.{module}.lora_B.weight"], function[index])
    assert any(
        kept[f"{module}.lora_B"].any()
        for number, unit in enumerate(prepared.units)
        for module in unit.modules
        if number not in last["north"]
    )  # what is left out is kept, not lost


# with a schedule; with an exchange that is under way when the run stops
HELD_UP = [({**KR, "on_kill": "drop"}, {}), (ALL, OVERLAP)]


@pytest.mark.parametrize(("schedule", "more"), HELD_UP, ids=["kr", "overlap"])
def test_a_resumed_simulation_is_the_uninterrupted_one(
    make_config: MakeConfig, tmp_path: Path, schedule: dict[str, Any], more: dict[str, Any]
) -> None:
    config = federation(make_config, schedule, **more, save_every=1)
    whole, broken = (
        config.model_copy(update={"output_dir": str(tmp_path / kind)})
        for kind in ("whole", "broken")
    )
    dlora.simulate(whole)
    with pytest.raises(dlora.Interrupted):
        dlora.simulate(broken, stop=stop_after(2))
    dlora.simulate(broken, resume=True)
    assert_identical(factors_of(broken), factors_of(whole))
    assert_identical(optimizer_of(broken), optimizer_of(whole))
    assert story(broken) == story(whole)
    for adapter in ("consensus", "peers/north"):
        files = (Path(run.output_dir, adapter, WEIGHTS) for run in (broken, whole))
        assert_identical(*map(load_file, files))


@pytest.mark.parametrize(
    ("schedule", "more"),
    [pytest.param(*HELD_UP[0], marks=pytest.mark.slow), HELD_UP[1]],
    ids=["kr", "overlap"],
)
def test_peers_that_stop_and_go_on_end_as_if_they_had_not(
    make_config: MakeConfig, tmp_path: Path, schedule: dict[str, Any], more: dict[str, Any]
) -> None:
    """Two of them: with more neighbours the order in which edges are decided, and so the rounding,
    is chance.
    """
    config = federation(make_config, schedule, 2, **more)
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


def test_who_catches_up_draws_with_the_others_again_and_keeps_its_scores(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = federation(make_config, {**KR, "kind": "random"}).model_copy(
        update={"output_dir": str(tmp_path / "here")}
    )
    made: list[Site] = []
    opened_here = contextlib.ExitStack()
    for folder in ("late", "there"):
        own = config.model_copy(update={"output_dir": str(tmp_path / folder)})
        run = opened_here.enter_context(opened(own, [RUN], own="north"))
        made.append(Site(run))
    late, there = made
    late.training.round(0, frozenset(late.training.trained))
    utility = [*late.schedules.each[0].utility]
    assert late.training.participants.optimizer_state() and any(utility)
    late.skip(3)
    for number in range(4):
        there.training.round(number, frozenset(there.training.trained))
    assert late.schedules.each[0].active == there.schedules.each[0].active
    assert (
        late.schedules.each[0].utility == utility
        and not late.training.participants.optimizer_state()
    )
    late.training.round(4, frozenset(late.training.trained))
    assert late.training.participants.optimizer_state()
    opened_here.close()


def test_peers_must_agree_on_the_schedule_and_sizes_are_bounded(make_config: MakeConfig) -> None:
    config = federation(make_config, KR)
    prepared = prepare(config)
    assert prepared.manifest["schedule"] == json.loads(
        config.schedule.model_dump_json(exclude_none=True)
    )
    plain = dataclasses.replace(
        prepared, config=config.model_copy(update={"schedule": type(config.schedule)()})
    )
    full = prepared.messages.num_bytes("round-000003")
    assert plain.messages.sizes("round-000003") == range(full, full + 1)
    assert prepared.messages.sizes("round-000003") == range(1, full + 1)
    for kind in (plain, prepared):
        assert kind.messages.sizes("sum") == range(
            kind.messages.num_bytes("sum"), kind.messages.num_bytes("sum") + 1
        )
        assert not kind.messages.sizes("round-000004") and not kind.messages.sizes("weights")


def test_the_baselines_beside_it_are_plain(make_config: MakeConfig) -> None:
    config = federation(make_config, RANDOM, **{"compare": ["fedavg"], "train.rounds": 1})
    runs = dlora.simulate(config)["runs"]
    assert runs["fedavg"]["bytes_on_wire"] == 6 * prepare(config).messages.num_bytes("round-000000")
    assert "adapter_fraction" in runs["dec-lora"] and "adapter_fraction" not in runs["fedavg"]
