"""Laws 6 and 8 for runs with a schedule or cores: over the wire as without, and as planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dlora
from dlora.config.run import Config
from dlora.costs import with_cloud
from dlora.events.log import read_log
from dlora.programs.plan import plan
from dlora.run.prepare import prepare
from kit.both_halves import CORE, SCHEDULES
from kit.bottlenecks import BOTTLENECK

pytestmark = pytest.mark.usefixtures("no_page")


class Replayed:
    """Who was active in each step of a run, by its log."""

    def __init__(self, log: Path, peer: str) -> None:
        events = [
            event for event in read_log(log) if event["event"] == "active" and event["peer"] == peer
        ]
        self.sets = {event["step"]: frozenset(event["units"]) for event in events}
        self.steps_done = 0

    @property
    def active(self) -> frozenset[int]:
        return self.sets[max(step for step in self.sets if step <= self.steps_done)]

    def observe(self, scores: Any) -> None:
        self.steps_done += 1


WIRED: dict[str, Any] = {
    "peers.count": 1,
    "train.rounds": 4,
    "train.local_steps": 5,
    "eval_every": 2,
}
RUNS: dict[str, dict[str, Any]] = {
    "kr": {
        "schedule": SCHEDULES["kr"],
        "split": {"cloud": "cloud", "wire": "bfloat16", "pipeline": 2},
    },
    "drop": {"schedule": SCHEDULES["kr-drop"], "split": {"cloud": "cloud", "wire": "int8"}},
    "random": {"schedule": SCHEDULES["random"], "split": {"cloud": "cloud", "wire": "int8"}},
    "static": {"schedule": SCHEDULES["static"], "split": {"cloud": "cloud", "wire": "float32"}},
    "bottleneck": {
        **BOTTLENECK,
        "schedule": SCHEDULES["kr"],
        "split": {"cloud": "cloud", "wire": "bfloat16"},
    },
    "core": {**CORE, "split": {"cloud": "cloud", "wire": "int8"}},
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("kr", 1),
        ("core", 1),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("drop", "random", "static")),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in ("kr", "drop", "random")),
        *(pytest.param("bottleneck", count, marks=pytest.mark.slow) for count in (1, 3)),
    ],
)
def test_the_plan_is_what_is_counted(
    make_config: Callable[..., Config], name: str, count: int
) -> None:
    """Law 8; for kr the plan is that of the active sets that the run has found."""
    made = make_config("bert", **{**WIRED, "peers.count": count}, **RUNS[name])
    before = plan(made)["cloud"]
    counted = dlora.simulate(made)["runs"]["dec-lora"]["cloud_bytes"]
    if "schedule" in RUNS[name]:
        again = made.model_copy(update={"output_dir": made.output_dir + "-plan"})
        log = Path(made.output_dir, "log.jsonl")
        prepared = prepare(again)
        costs = with_cloud.split_costs(
            prepared, None, [Replayed(log, peer) for peer in prepared.names]
        )
        assert counted == pytest.approx(costs["cloud_bytes"], rel=0.002)
    if name not in ("kr", "drop", "bottleneck"):
        assert counted == pytest.approx(before["cloud_bytes"], rel=0.02)


@pytest.mark.parametrize("name", ["kr", pytest.param("drop", marks=pytest.mark.slow), "core"])
def test_a_run_over_the_wire_is_the_run_without(
    make_config: Callable[..., Config], tmp_path: Path, name: str
) -> None:
    section = {**WIRED, **RUNS[name], "split.wire": "float32"}
    wired = dlora.simulate(make_config("bert", **section))["runs"]["dec-lora"]
    section.pop("split"), section.pop("split.wire")
    local = dlora.simulate(make_config("bert", **section, output_dir=str(tmp_path / "local")))[
        "runs"
    ]["dec-lora"]
    assert wired["consensus"]["loss"] == pytest.approx(local["consensus"]["loss"], abs=1e-5)
    assert wired.get("adapter_fraction") == local.get("adapter_fraction")


@pytest.mark.slow
def test_a_resumed_run_over_the_wire_is_the_uninterrupted_one(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    section = {**WIRED, **RUNS["kr"], "save_every": 1}
    whole = make_config("bert", **section)
    dlora.simulate(whole)
    parted = make_config("bert", **section, output_dir=str(tmp_path / "parted"))
    rounds = iter([False, True])
    with pytest.raises(dlora.Interrupted):
        dlora.simulate(parted, stop=lambda: next(rounds))
    dlora.simulate(parted, resume=True)
    adapters = [
        Path(one.output_dir, "consensus", "adapter_model.safetensors").read_bytes()
        for one in (whole, parted)
    ]
    assert adapters[0] == adapters[1]
