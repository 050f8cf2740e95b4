"""A part of the peers takes part in a round: who is drawn trains and mixes, the others rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dlora
from dlora.config.peers import TopologySection
from dlora.config.run import Config
from dlora.decentralized.drawn import drawn_peers
from dlora.decentralized.matrices import ROUNDING, check_mixing
from dlora.decentralized.topology import build_topology
from dlora.errors import Interrupted
from dlora.events.log import read_log
from dlora.run.checkpoint_files import read_checkpoint
from dlora.run.local_round import Training
from dlora.run.prepare import prepare
from dlora.run.schedules import Schedules
from dlora.train import Participants, local_steps
from kit.run_folders import assert_identical, factors_of, optimizer_of, stop_after
from kit.updates import UPDATE_BOUND, assert_same

pytestmark = pytest.mark.usefixtures("no_page")

KEYS = {
    "train.rounds": 6,
    "train.model_dropout": 0.0,
    "peers.count": 6,
    "peers.participation": 0.5,
    "peers.topology": {"kind": "complete"},
    "eval_every": 0,
}
KR = {"kind": "kr", "active_fraction": 0.4, "period": 3, "warmup_steps": 4}


def test_the_draw_follows_from_seed_and_round() -> None:
    rounds = [drawn_peers(0.1, 20, 7, round) for round in range(200)]
    assert rounds == [drawn_peers(0.1, 20, 7, round) for round in range(200)]
    assert {len(drawn) for drawn in rounds} == {2} and all(one < two for one, two in rounds)
    counts = np.bincount(np.concatenate(rounds), minlength=20)
    assert counts.min() > 5 and counts.max() < 40  # 20 each are expected
    assert drawn_peers(0.01, 20, 7, 0) != [] and drawn_peers(1.0, 3, 7, 0) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["ring", "complete", "exponential", "hypercube", "base-k"])
@pytest.mark.parametrize("weights", [None, "laplacian"])
def test_the_matrix_of_those_who_are_there_keeps_the_mean(kind: Any, weights: Any) -> None:
    if weights and kind in ("hypercube", "base-k"):
        return  # they fix their weights
    topology = build_topology(TopologySection(kind=kind), weights, [str(one) for one in range(8)])
    for round in range(topology.period):
        there = [0, 1, 3, 4, 6]
        edges, mixing = topology.among(there, round)
        check_mixing(mixing)
        assert set(edges) == {(i, j) for i, j in topology.edges(round) if i in there and j in there}
        for peer in (2, 5, 7):
            assert mixing[peer, peer] == 1
        if kind == "complete" and weights is None:
            assert np.abs(mixing.toarray()[np.ix_(there, there)] - 1 / len(there)).max() <= ROUNDING


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_who_is_drawn_trains_as_alone_and_who_rests_keeps_its_state(
    make_config: Callable[..., Config], optimizer: str
) -> None:
    """The baseline without an exchange: each peer is what a loop of its own makes of it."""
    rate = {"sgd": 0.5, "adamw": 5e-3}[optimizer]
    keys = {"train.optimizer": optimizer, "train.learning_rate": rate, "compare": ["local"]}
    config = make_config(**KEYS, **keys)
    dlora.simulate(config)
    prepared = prepare(config)
    training = Training(prepared, prepared.local_steps, 1, pooled=False)
    ended = factors_of(config, "local")
    for peer in range(6):
        alone = Participants(prepared.model.initial, [range(1)], config.train, torch.device("cpu"))
        for round in range(config.train.rounds):
            if peer in prepared.drawn(round):
                alone.groups[0].train_only(frozenset(prepared.trained))
                local_steps(
                    prepared.model,
                    alone.groups[0],
                    training.batches([peer], round, 2),
                    training.learning_rates(round, 2),
                    config.train,
                )
        start = prepared.model.initial
        moved, as_moved = (
            {name: tensor - start[name] for name, tensor in of.items()}
            for of in (
                {name: tensor[peer] for name, tensor in ended.items()},
                {name: tensor[0] for name, tensor in alone.factors.items()},
            )
        )
        assert_same(moved, as_moved, UPDATE_BOUND[optimizer], "classification")


def test_only_who_is_drawn_changes_and_the_mean_stays(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    def after(rounds: int) -> dict[str, torch.Tensor]:
        config = make_config(
            **KEYS | {"train.rounds": rounds, "train.optimizer": "sgd", "train.learning_rate": 0.1},
            **{"train.lr_scheduler_type": "constant", "output_dir": str(tmp_path / str(rounds))},
        )
        dlora.simulate(config)
        return factors_of(config)

    prepared = prepare(make_config(**KEYS))
    before, then = after(1), after(2)
    there = prepared.drawn(1)
    for name, tensor in then.items():
        for peer in range(6):
            assert torch.equal(tensor[peer], before[name][peer]) == (peer not in there), name
        # a complete graph: who takes part leaves with one mean
        assert (tensor[there] - tensor[there[0]]).abs().max() < 1e-6


def test_a_resumed_run_ends_with_the_same_bits(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Law 10, and the log says who rested."""
    ends = []
    for name in ("one", "two"):
        config = make_config(**KEYS, output_dir=str(tmp_path / name), compare=["pooled", "fedavg"])
        if name == "two":
            with pytest.raises(Interrupted):
                dlora.simulate(config, stop=stop_after(3))
        summary = dlora.simulate(config, resume=name == "two")
        ends.append((factors_of(config), optimizer_of(config), factors_of(config, "pooled")))
        rounds = [
            event
            for event in read_log(Path(config.output_dir, "log.jsonl"))
            if event["event"] == "round" and event["run"] == "dec-lora"
        ]
        prepared = prepare(config)
        for event in rounds:
            trained = [peer for peer, loss in enumerate(event["losses"]) if loss is not None]
            assert trained == prepared.drawn(event["round"])
        assert summary["participation"] == 0.5
        # three peers, two messages over each of three edges
        message = prepared.messages.num_bytes("round-000000")
        assert summary["runs"]["dec-lora"]["bytes_on_wire"] == 6 * 3 * 2 * message
    for one, two in zip(*ends, strict=True):
        assert_identical(one, two)


@pytest.mark.slow
def test_stacks_change_nothing(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """Law 2, with rule alternate: its tensors have taken different numbers of steps."""
    ends = []
    for size in (1, 6):
        config = make_config(
            **KEYS | {"peers.rule": "alternate", "peers.period": 2, "peers.group_size": size},
            output_dir=str(tmp_path / str(size)),
        )
        dlora.simulate(config)
        ends.append(factors_of(config))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_schedule_of_every_unit_changes_nothing(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """With a schedule each participant is a group of its own, and its state rests there."""
    every = [name for unit in prepare(make_config(schedule=KR)).units for name in unit.modules]
    ends = []
    for name, more in {
        "all": {},
        "static": {"schedule": {"kind": "static", "units": every}},
    }.items():
        config = make_config(**KEYS, **more, output_dir=str(tmp_path / name))
        dlora.simulate(config)
        ends.append(factors_of(config))
    start = prepare(config).model.initial
    moved, as_moved = ({name: of[name] - start[name] for name in start} for of in ends)
    assert_same(moved, as_moved, UPDATE_BOUND["adamw"], "classification")


def test_a_unit_that_is_revived_while_its_peer_rests_begins_anew(
    make_config: Callable[..., Config],
) -> None:
    """Its first moment is zero, as that of a unit revived in a local step."""
    drawn_units = {"kind": "random", "active_fraction": 0.4, "period": 2}
    prepared = prepare(make_config(**KEYS | {"train.rounds": 12}, schedule=drawn_units))
    schedules = Schedules("dec-lora", prepared, lambda event: None)
    training = Training(prepared, prepared.local_steps, 1, False, schedules.scheduled)
    revived = 0
    for number in range(12):
        before = [one.active for one in schedules.each]
        training.round(number, frozenset(prepared.trained))
        for group in training.participants.groups:
            peer, units = group.first, group.units
            assert units is not None
            if peer in prepared.drawn(number):
                continue
            for unit in schedules.each[peer].active - before[peer]:
                for name in units.names[unit]:
                    state = group.optimizer.state.get(group.leaves[f"{name}@0"], {})
                    if "exp_avg" in state:
                        assert not state["exp_avg"].any(), (number, peer, name)
                        revived += 1
    assert revived > 10


@pytest.mark.parametrize(
    "more",
    [
        {"schedule": KR},
        pytest.param({"split": {"cloud": "hub", "wire": "float32"}}, marks=pytest.mark.slow),
        pytest.param(
            {"schedule": KR | {"on_kill": "drop"}, "split": {"cloud": "hub"}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["kr", "split", "split-kr"],
)
def test_units_and_clouds_rest_too(
    more: dict[str, Any], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Who rests keeps its factors and moments, and its units go on as those of the others."""
    config = make_config(**KEYS | {"save_every": 1}, **more)
    dlora.simulate(config)
    *_, before, after = sorted(Path(config.output_dir, "checkpoints", "dec-lora").glob("round-*"))
    earlier, later = read_checkpoint(before), read_checkpoint(after)
    there = prepare(config).drawn(5)
    for name, tensor in later.factors.items():
        for peer in set(range(6)) - set(there):
            assert torch.equal(tensor[peer], earlier.factors[name][peer]), name
    for path, moment in later.optimizer.items():
        rests = int(path.split("/")[0]) not in there
        # the first moment of a unit that was revived meanwhile starts at zero
        begun = path.endswith("exp_avg") and not moment.any()
        assert not rests or begun or torch.equal(moment, earlier.optimizer[path]), path
    assert (
        len({one["steps_done"] for one in later.state.get("schedules", [{"steps_done": 0}])}) == 1
    )
    stopped = make_config(**KEYS, **more, output_dir=str(tmp_path / "stopped"))
    with pytest.raises(Interrupted):
        dlora.simulate(stopped, stop=stop_after(3))
    dlora.simulate(stopped, resume=True)
    assert_identical(factors_of(stopped), factors_of(config))
