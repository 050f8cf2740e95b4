"""Law 13: the number of processes under torchrun changes nothing but the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import dlora
from dlora.config.run import Config
from dlora.run.checkpoint_files import Checkpoint, read_checkpoint
from dlora.run.prepare import prepare
from kit.bottlenecks import PARTS
from kit.simulate_ranks import simulated
from kit.updates import UPDATE_BOUND, assert_same, relative_difference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_page")]

PEERS = 7  # a number that no number of ranks here divides
KR = {"kind": "kr", "active_fraction": 0.4, "period": 3, "warmup_steps": 4}
SCENARIOS: dict[str, dict[str, Any]] = {
    "ring": {"compare": ["pooled", "local", "fedavg"], "eval_peers_every": 2},
    "base-k": {"peers.topology": {"kind": "base-k"}},
    "bfloat16": {"peers.wire": "bfloat16", "peers.rule": "alternate", "peers.period": 2},
    "erdos-renyi": {"peers.topology": {"kind": "erdos-renyi", "p": 0.4}, "peers.overlap": True},
    "complete": {"peers.topology": {"kind": "complete"}, "eval_peers": 3},
    "kr": {"schedule": KR, "train.rounds": 5},
    "kr-complete": {"schedule": KR | {"on_kill": "drop"}, "peers.topology": {"kind": "complete"}},
    "epochs": {
        "train.local_steps": None,
        "train.local_epochs": 1,
        "data.partition": {"kind": "dirichlet", "concentration": 1.0},
    },
    "drawn": {
        "peers.participation": 0.5,
        "peers.topology": {"kind": "complete"},
        "compare": ["pooled", "local"],
    },
    "drawn-kr": {
        "peers.participation": 0.5,
        "peers.topology": {"kind": "complete"},
        "schedule": KR,
        "train.rounds": 5,
    },
    "split": {"split": {"cloud": "hub", "wire": "float32"}},
    "split-kr": {"split": {"cloud": "hub", "wire": "float32"}, "schedule": KR},
}

# each rank holds a part of the frozen model; with these keys ranks make unequal numbers of passes
SHARDED: dict[str, dict[str, Any]] = {
    "ring": {"compare": ["pooled"], "eval_peers_every": 2, "peers.group_size": 2},
    "kr": SCENARIOS["kr"] | {"train.gradient_checkpointing": True},
    "core": {"lora.placement": "core", "lora.r": 3, "eval_peers": 3},
    "nf4": {"quantization": "nf4", "train.rounds": 2},
    "epochs": SCENARIOS["epochs"] | {"train.rounds": 2},
    "drawn": SCENARIOS["drawn"] | {"train.rounds": 2},
}


def configs(
    make_config: Callable[..., Config],
    folder: Path,
    scenarios: Mapping[str, dict[str, Any]] = SCENARIOS,
    **more: Any,
) -> dict[str, Config]:
    common = {
        "train.rounds": 4,
        "train.model_dropout": 0.0,
        "train.lr_scheduler_type": "constant",
        "train.learning_rate": 5e-3,
        "peers.count": PEERS,
        "eval_every": 2,
        "save_every": 2,
    }
    made = {}
    for name, keys in scenarios.items():
        made[name] = make_config(**common | keys | more, output_dir=str(folder / name))
    return made


def end_of(config: Config, arm: str) -> Checkpoint:
    """The last checkpoint, with the tensors of all participants."""
    *_, folder = sorted(Path(config.output_dir, "checkpoints", arm).glob("round-*"))
    return read_checkpoint(folder)


def assert_alike(one: Config, other: Config, summaries: tuple[Any, Any]) -> None:
    """The same factors, scores and bytes."""
    alone, together = summaries
    assert alone["manifest"] == together["manifest"]
    start = prepare(one).model.initial
    assert alone["runs"].keys() == together["runs"].keys()
    for arm, run in alone["runs"].items():
        same = together["runs"][arm]
        for key in ("bytes_on_wire", "tokens", "local_steps", "adapter_fraction"):
            assert run.get(key) == same.get(key), (arm, key)
        # each rank opens a link of its own, and hands off what that link has not carried before
        allowed = 2e-4 if one.schedule.kind == "all" else 2e-2
        sent, as_sent = (of.get("cloud_bytes", 0) for of in (run, same))
        assert sent == pytest.approx(as_sent, rel=allowed), arm
        for key in ("consensus", "peers_mean", "best", "consensus_distance"):
            if run[key] is None:  # a pooled participant has no peers
                assert same[key] is None
                continue
            assert run[key] == pytest.approx(same[key], rel=2e-4, abs=1e-9), (arm, key)
        assert run["peers"].keys() == same["peers"].keys()
        ours, theirs = end_of(one, arm), end_of(other, arm)
        # a difference of one float32 rounding may round to another bfloat16
        bound = 1e-2 if one.peers.wire == "bfloat16" else UPDATE_BOUND["adamw"]
        moved, as_moved = (
            {name: tensor - start[name] for name, tensor in ended.factors.items()}
            for ended in (ours, theirs)
        )
        if one.bottleneck is not None:
            for part in (*PARTS, "classifier"):
                assert relative_difference(as_moved, moved, part) < bound
        elif one.lora.placement == "core":
            assert relative_difference(as_moved, moved, "lora_M") < bound
        else:
            assert_same(as_moved, moved, bound, one.task)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_change_nothing(
    ranks: int, tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    one, several = (configs(make_config, tmp_path / name) for name in ("one", "several"))
    together = simulated(ranks, several, tmp_path / "files")
    for name in SCENARIOS:
        assert_alike(one[name], several[name], (dlora.simulate(one[name]), together[name]))


@pytest.mark.parametrize("divided", [False, True])
def test_bottlenecks_too(divided: bool, tmp_path: Path, make_config: Callable[..., Config]) -> None:
    scenario = {"it": {"lora": {}, "bottleneck": {"r": 4, "activation": "silu"}}}
    one = configs(make_config, tmp_path / "one", scenario)
    several = configs(make_config, tmp_path / "several", scenario, shard_model=divided)
    together = simulated(2, several, tmp_path / "files")
    assert_alike(one["it"], several["it"], (dlora.simulate(one["it"]), together["it"]))


def test_a_divided_model_changes_nothing(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    """Each of 3 ranks holds a part of the frozen model, and 7 peers are dealt unequally."""
    one = configs(make_config, tmp_path / "one", SHARDED)
    several = configs(make_config, tmp_path / "several", SHARDED, shard_model=True)
    together = simulated(3, several, tmp_path / "files")
    for name in SHARDED:
        assert_alike(one[name], several[name], (dlora.simulate(one[name]), together[name]))
