"""The units of a schedule in real models, and what is said of them before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import dlora
from dlora.config.run import Config
from dlora.errors import ConfigError
from dlora.programs.simulate import dry_run
from dlora.run.prepare import prepare
from kit.scheduled_runs import active_events, scheduled

pytestmark = pytest.mark.usefixtures("no_page")
MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("kind", ["kr", "probe", "static"])
def test_a_dry_run_says_what_the_first_step_trains(make_config: MakeConfig, kind: str) -> None:
    units = {"schedule.units": ["layer.1.attention.self.query"]} if kind == "static" else {}
    config = scheduled(make_config, kind, **units)
    said = dry_run(config)["schedule"]
    dlora.simulate(config)
    active = active_events(config)[0]["units"]
    costs = [unit.cost for unit in prepare(config).units]
    fraction = sum(costs[unit] for unit in active) / sum(costs)
    assert said == {
        "kind": kind,
        "units": len(costs),
        "active": len(active),
        "adapter_fraction": fraction,
    }


@pytest.mark.parametrize("kind", ["kr", "probe"])
def test_a_run_that_is_over_before_anything_is_chosen_says_so(
    make_config: MakeConfig, kind: str
) -> None:
    config = scheduled(make_config, kind, **{"schedule.warmup_steps": 40})
    for start in (dry_run, dlora.simulate):
        with pytest.warns(
            UserWarning,
            match=r"chooses after a warm-up of 4\d local steps, and this run has 12; lower",
        ):
            start(config)


def test_a_unit_that_is_not_there_is_named(make_config: MakeConfig) -> None:
    config = scheduled(make_config, "static", **{"schedule.units": ["layer.9.output.dense"]})
    for start in (dlora.simulate, dry_run):
        with pytest.raises(
            ConfigError,
            match=r"layer.9.output.dense is no adapted module; .* bert.encoder.layer.\*.attention",
        ):
            start(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("family", "task", "together"),
    [
        ("llama", "causal-lm", {"gate_proj", "up_proj"}),
        ("gpt2", "causal-lm", {"c_attn"}),
    ],
)
def test_units_are_found_in_every_family(
    make_config: MakeConfig, family: str, task: str, together: set[str]
) -> None:
    """Every adapted module is in one unit, beside those that read the same input."""
    prepared = prepare(scheduled(make_config, family=family, task=task))
    modules = [module for unit in prepared.units for module in unit.modules]
    assert sorted(modules) == sorted(
        {name.rpartition(".")[0] for name in prepared.model.initial if ".lora_" in name}
    )
    assert [
        {module.rpartition(".")[2] for module in unit.modules} for unit in prepared.units
    ].count(together) == 2
