"""Law 7 for bottleneck adapters: which units there are, what a killed one is, and that all units
active is no schedule.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config, ScheduleSection
from dlora.lora.kill_revive import Schedule
from dlora.lora.units import Unit, device_flops
from dlora.run.prepare import prepare
from kit.bottlenecks import BOTTLENECK, PARTS, Hooked, assert_same, outputs
from kit.run_folders import factors_of
from kit.scheduled_peers import KR, NAMES, Peers, federation
from kit.scheduled_runs import active_events, scheduled
from kit.updates import UPDATE_BOUND

pytestmark = pytest.mark.usefixtures("no_page")
MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
def test_each_bottleneck_is_a_unit_and_costs_its_width_four_times(
    make_config: MakeConfig, family: str
) -> None:
    prepared = prepare(scheduled(make_config, family=family, **BOTTLENECK))
    assert [unit.modules for unit in prepared.units] == [(name,) for name in outputs(family)]
    assert {unit.cost for unit in prepared.units} == {4 * 64}


def test_everything_active_is_no_schedule(make_config: MakeConfig, tmp_path: Path) -> None:
    """The same numbers, to the bit."""
    plain, full = (
        make_config(**BOTTLENECK, **more, **{"peers.count": 1}, output_dir=str(tmp_path / name))
        for name, more in {
            "plain": {},
            "full": {"schedule": {"kind": "kr", "active_fraction": 1.0, "warmup_steps": 1}},
        }.items()
    )
    for config in (plain, full):
        dlora.simulate(config)
    for name, tensor in factors_of(plain).items():
        assert torch.equal(tensor, factors_of(full)[name]), name


@pytest.mark.parametrize("on_kill", ["hand-off", "drop"])
def test_a_static_unit_is_a_model_with_that_bottleneck_alone(
    make_config: MakeConfig, on_kill: str
) -> None:
    """The oracle has one bottleneck; those that never train add nothing."""
    last = outputs("bert")[-1]
    chosen = {"schedule.units": [last.partition(".")[2]], "schedule.on_kill": on_kill}
    steps = {"train.rounds": 12, "train.local_steps": 1}
    config = scheduled(make_config, "static", **chosen, **BOTTLENECK, **steps)
    dlora.simulate(config)
    start = prepare(config).model.initial
    ours = {name: tensor[0] - start[name] for name, tensor in factors_of(config).items()}
    hooked = Hooked(config, [last])
    with torch.no_grad():  # drawn after the others
        hooked.trained[f"{last}.down_weight"].copy_(start[f"{last}.down_weight"])
    hooked.initial[f"{last}.down_weight"] = start[f"{last}.down_weight"]
    hooked.train(config, prepare(config), 0)
    assert_same(
        {name: ours[name] for name in hooked.initial}, hooked.update(), UPDATE_BOUND["adamw"]
    )
    assert not any(ours[name].any() for name in ours if name not in hooked.initial)


def test_a_dropped_unit_is_zero_in_the_folder_and_kept_in_the_checkpoint(
    make_config: MakeConfig,
) -> None:
    config = scheduled(make_config, "kr", **{"schedule.on_kill": "drop"}, **BOTTLENECK)
    summary = dlora.simulate(config)
    active = active_events(config)[-1]["units"]
    written = load_file(Path(config.output_dir, "consensus", "bottleneck.safetensors"))
    kept, trained = (
        factors_of(config),
        set[int]().union(*(event["units"] for event in active_events(config))),
    )
    assert trained == {0, 1, 2, 3} != set(active)
    for number, name in enumerate(outputs("bert")):
        for part in PARTS[2:]:
            assert written[f"{name}.{part}"].any() == (number in active)
            assert kept[f"{name}.{part}"].any()
    printed = summary["runs"]["dec-lora"]["consensus"]["loss"]
    assert dlora.score(config.output_dir)["consensus"]["loss"] == pytest.approx(printed, abs=1e-6)


@pytest.mark.parametrize("blocks", [12, 32])
def test_an_eighth_saves_what_was_promised(blocks: int) -> None:
    """87.5 % of the traffic and 82 % of the device's FLOPs after the warm-up, with two bottlenecks
    in each block.
    """
    units = [Unit((f"{number}",), 64, (64,), (8,)) for number in range(2 * blocks)]
    flops = partial(device_flops, units, placement="literal")
    schedule = Schedule(ScheduleSection(kind="kr"), [unit.cost for unit in units], flops, 0)
    chance = random.Random(0)
    for _ in range(1000):
        schedule.observe({unit: chance.expovariate(1) for unit in schedule.active})
    assert schedule.meter.after_warmup is not None
    traffic, spent = schedule.meter.after_warmup
    assert 1 - traffic >= 0.875 and 1 - spent >= 0.82


@pytest.mark.slow
@pytest.mark.parametrize("on_kill", ["hand-off", "drop"])
def test_peers_are_their_simulation_and_send_what_it_counts(
    make_config: MakeConfig, tmp_path: Path, on_kill: str
) -> None:
    """Laws 5 and 8; sets change in the middle of rounds."""
    adapter: dict[str, Any] = {"lora": {}, "bottleneck": {"r": 4, "activation": "silu"}}
    adapter["lora.target_modules"] = "all-linear"  # what `federation` asks of LoRA
    config = federation(make_config, {**KR, "on_kill": on_kill}, **adapter)
    result = dlora.simulate(config)["runs"]["dec-lora"]
    peers = Peers(config, tmp_path / "peers")
    peers.run()
    start, together = prepare(config).model.initial, factors_of(config)
    for index, name in enumerate(NAMES):
        own = factors_of(peers.configs[name])
        ours, reference = (
            {key: tensor[row] - start[key] for key, tensor in tensors.items()}
            for tensors, row in ((own, 0), (together, index))
        )
        assert_same(ours, reference, UPDATE_BOUND["adamw"])
        assert len(peers.active(name)) > 3
    degree = {"north": 1, "east": 2, "south": 1}
    counted = {
        name: degree[name] * sum(lengths.values()) for name, lengths in peers.lengths.items()
    }
    assert result["bytes_on_wire"] == sum(counted.values())
