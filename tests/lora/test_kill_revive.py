"""What Kill and Revive does to training (law 7): who rests, what is kept, sent and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config, ScheduleSection
from dlora.config.training import LoraSection, TrainSection
from dlora.events.log import read_log
from dlora.lora.active import schedule_units
from dlora.lora.kill_revive import Schedule
from dlora.lora.units import Unit
from dlora.run.prepare import prepare
from dlora.train import Group as Training
from kit.run_folders import assert_identical, factors_of, optimizer_of, stop_after, story
from kit.scheduled_runs import active_events, scheduled
from kit.updates import KINDS

pytestmark = pytest.mark.usefixtures("no_page")
MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(
    ("optimizer", "lora"),
    [
        ("adamw", {}),
        pytest.param("sgd", {}, marks=pytest.mark.slow),
        *(
            pytest.param("adamw", KINDS[kind], marks=pytest.mark.slow)
            for kind in ("patterns", "dora", "pissa")
        ),
    ],
)
def test_everything_active_is_no_schedule_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, optimizer: str, lora: dict[str, Any]
) -> None:
    """Law 7, through all of the schedule's machinery and not round it."""
    keys = {"train.optimizer": optimizer, **lora}
    plain = make_config(**{"peers.count": 1, "train.local_steps": 4, "eval_every": 0, **keys})
    dlora.simulate(plain)
    for kind in ("all", "kr"):
        whole = scheduled(
            make_config,
            kind,
            output_dir=str(tmp_path / kind),
            **{"schedule.active_fraction": 1.0, **keys},
        )
        result = dlora.simulate(whole)["runs"]["dec-lora"]
        assert_identical(factors_of(whole), factors_of(plain))
        assert ("adapter_fraction" in result) == (kind != "all")
        assert result.get("adapter_fraction", 1.0) == 1.0


def test_killed_units_rest_and_the_log_tells_who_was_active(make_config: MakeConfig) -> None:
    config = scheduled(
        make_config,
        "static",
        **{"schedule.units": ["layer.1.attention.self.query", "layer.0.output.dense"]},
    )
    result = dlora.simulate(config)["runs"]["dec-lora"]
    initial = prepare(config).model.initial
    trained = {
        name
        for name, tensor in factors_of(config).items()
        if not torch.equal(tensor[0], initial[name])
    }
    block = "bert.encoder.layer"
    modules = [f"{block}.1.attention.self.{name}" for name in ("query", "key", "value")] + [
        f"{block}.0.output.dense"
    ]
    expected = {f"{module}.lora_{factor}" for module in modules for factor in "AB"}
    assert expected <= trained <= expected | {"classifier.weight", "classifier.bias"}
    assert {path.split("/")[1].partition("@")[0] for path in optimizer_of(config)} == trained
    [units] = [
        event
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "units"
    ]
    [first] = active_events(config)
    assert {name for unit in first["units"] for name in units["units"][unit]["modules"]} == set(
        modules
    )
    costs = [unit["cost"] for unit in units["units"]]
    # 2 (d_in + sum d_out) of qkv, o, up, down
    assert sum(costs) == 2 * 2 * (4 * 64 + 2 * 64 + (64 + 128) + (128 + 64))
    assert result["adapter_fraction"] == sum(costs[unit] for unit in first["units"]) / sum(costs)


@pytest.mark.parametrize(
    ("on_kill", "lora"),
    [
        ("hand-off", {}),
        ("drop", {}),
        ("drop", {"lora.placement": "core"}),
        ("drop", KINDS["dora"]),
        ("drop", KINDS["pissa"]),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [
                ("drop", KINDS["dora"] | KINDS["pissa"]),
                ("drop", KINDS["patterns"]),
                ("hand-off", KINDS["dora"]),
                ("hand-off", KINDS["pissa"]),
            ]
        ),
    ],
)
def test_what_is_exported_is_what_was_evaluated(
    make_config: MakeConfig, on_kill: str, lora: dict[str, Any]
) -> None:
    """PEFT with the adapter on disk gives the last evaluation's loss; dropped units change nothing
    in it, handed-off ones stay.
    """
    config = scheduled(
        make_config, **{"schedule.on_kill": on_kill, "train.learning_rate": 5e-2, **lora}
    )
    result = dlora.simulate(config)["runs"]["dec-lora"]
    last = active_events(config)[-1]
    units, nothing = prepare(config).units, prepare(config).model.nothing
    saved = load_file(Path(config.output_dir, "consensus/adapter_model.safetensors"))
    for number, unit in enumerate(units):
        for module in unit.modules:
            lora_A, lora_B, lengths = (
                saved.get(f"base_model.model.{module}.lora_{end}", torch.empty(0))
                for end in ("A.weight", "B.weight", "magnitude_vector")
            )
            changes_nothing = bool((lora_B @ lora_A).abs().max() < 1e-6)
            if lengths.numel():
                changes_nothing &= torch.equal(lengths, nothing[f"{module}.lora_magnitude_vector"])
            assert changes_nothing == (on_kill == "drop" and number not in last["units"]), module
    torch.manual_seed(config.seed)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=2, pad_token_id=0
    )
    model = peft.PeftModel.from_pretrained(base, str(Path(config.output_dir, "consensus"))).eval()
    rows = prepare(config).data.evaluation
    losses = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        losses.append(model(input_ids=ids, labels=torch.tensor([row.labels])).loss.item())
    assert sum(losses) / len(losses) == pytest.approx(result["consensus"]["loss"], rel=1e-5)


def test_where_cores_train_a_unit_costs_its_modules_ranks(make_config: MakeConfig) -> None:
    """r numbers a token and module: down, up, and the same again for the gradients."""
    prepared = prepare(scheduled(make_config, **{"lora.placement": "core", "lora.r": 3}))
    assert {len(unit.modules): unit.cost for unit in prepared.units} == {1: 4 * 3, 3: 4 * 3 * 3}
    [schedule] = schedule_units(
        prepared.config.schedule, prepared.units, prepared.config.lora, 0, ["one"]
    ).schedules
    assert schedule.costs == tuple(unit.cost for unit in prepared.units)


def test_a_dropped_unit_is_left_out_and_comes_back_with_what_it_had() -> None:
    factors, units = one_layer_each(num_units=2, num_participants=1)
    expected = {name: tensor.clone() for name, tensor in factors.items()}
    section = ScheduleSection(
        kind="kr", active_fraction=0.5, on_kill="drop", period=1, warmup_steps=2, rewarm_steps=1
    )
    training = Training(
        factors,
        0,
        1,
        TrainSection(optimizer="sgd"),
        schedule_units(section, units, LoraSection(), 0, ["p"]),
    )
    assert training.units is not None
    training.train_only(frozenset(factors))
    changes = 0
    for step in range(8):
        active = {f"u{unit}" for unit in training.units.schedules[0].active}
        if step % 4 == 0:  # a round begins; what was mixed lies in its place, whoever is active
            for name, tensor in factors.items():
                torch.testing.assert_close(tensor, expected[name])
                tensor += 1.0
                expected[name] += 1.0
            assert {name for name, _ in training.units.left_out()} == {"u0.lora_B", "u1.lora_B"} - {
                f"{module}.lora_B" for module in active
            }
            training.units.leave_out()
        for name, tensor in factors.items():
            module, _, factor = name.rpartition(".")
            rests = module != "head" and module not in active
            assert training.parameters[name].requires_grad != rests
            torch.testing.assert_close(
                tensor, 0 * tensor if rests and factor == "lora_B" else expected[name]
            )
            if not rests:
                training.parameters[name].grad = torch.ones_like(tensor)
                expected[name] -= 0.1
        training.step(0.1, None)
        changes += active != {f"u{unit}" for unit in training.units.schedules[0].active}
        if step % 4 == 3:
            training.units.put_back()
    assert changes >= 3
    # each unit had its turn in the last four steps
    assert training.units.took_part(0) == frozenset(factors)


def test_a_revived_unit_has_its_second_moment_and_warms_up() -> None:
    """AdamW: as long as it rests its moments do; revived, the first is zero, and the rate rises
    over rewarm_steps.
    """
    factors, units = one_layer_each(num_units=2, num_participants=1)
    section = ScheduleSection(
        kind="kr", active_fraction=0.5, period=4, warmup_steps=8, rewarm_steps=4
    )
    scheduled = schedule_units(section, units, LoraSection(), 0, ["p"])
    training = Training(
        factors, 0, 1, TrainSection(optimizer="adamw", max_grad_norm=1e-3), scheduled
    )
    assert training.units is not None
    training.train_only(frozenset(factors))
    seen: set[str | int | None] = set()
    for _ in range(24):
        [schedule] = training.units.schedules
        [active] = schedule.active
        age = schedule.age(active)
        leaf = training.units.leaves[f"u{active}.lora_B@0"]
        state = dict(training.optimizer.state.get(leaf, {}))
        if age == 0 and state:  # revived, not for the first time
            assert not state["exp_avg"].any() and state["exp_avg_sq"].all()
            seen.add("revived")
        for name, tensor in factors.items():
            if training.parameters[name].requires_grad:
                training.parameters[name].grad = torch.full_like(tensor, 3.0)
        # B alone: two numbers, before clipping
        assert training.units.scores() == [{active: 2 * 3.0}]
        training.step(0.1, 1e-3)
        rates = {group["unit"]: group["lr"] for group in training.optimizer.param_groups}
        assert rates[None] == 0.1
        assert rates[active] == pytest.approx(
            0.1 * (1.0 if age is None else min(1.0, (age + 1) / 4))
        )
        seen.add(age)
    assert {"revived", None, 0, 1, 2, 3} <= seen


def test_a_utility_is_of_the_latest_turn_and_of_a_number_on_the_wire() -> None:
    """Three units of costs 10, 20 and 30, one active: what counts is the score over the cost, as it
    was last seen.
    """
    section = ScheduleSection(kind="kr", active_fraction=0.5, period=10, warmup_steps=3)
    schedule = Schedule(section, [10, 20, 30], len, seed=0)
    while schedule.steps_done < schedule.warmup_steps:
        schedule.observe({unit: 60.0 for unit in schedule.active})
    # they cost half of all
    assert schedule.utility == [6.0, 3.0, 2.0] and schedule.active == {0, 1}
    for _ in range(10):
        schedule.observe({0: 1.0, 1: 60.0})
    assert schedule.utility == [0.1, 3.0, 2.0]  # the rotation's score is not in it
    assert schedule.active == {2}  # on trial, and as dear as the others together
    for _ in range(2):
        schedule.observe({2: 30.0})
    assert schedule.utility == [0.1, 3.0, 1.0] and schedule.active == {0, 1}
    for _ in range(8):
        schedule.observe({0: 1.0, 1: 1.0})
    for _ in range(2):
        schedule.observe({2: 30.0})
    assert schedule.utility == [0.1, 0.05, 1.0] and schedule.active == {2}  # it stays


def one_layer_each(
    num_units: int, num_participants: int
) -> tuple[dict[str, torch.Tensor], list[Unit]]:
    """Units of one module, 3 in, 2 out, rank 1, with a head beside them."""
    torch.manual_seed(0)
    factors = {"head.weight": torch.randn(num_participants, 2, 2)}
    for unit in range(num_units):
        factors[f"u{unit}.lora_A"] = torch.randn(num_participants, 1, 3)
        factors[f"u{unit}.lora_B"] = torch.randn(num_participants, 2, 1)
    return factors, [Unit((f"u{unit}",), 3, (2,), (1,)) for unit in range(num_units)]


@pytest.mark.slow  # with neighbours it is in test_scheduled_peers.py
@pytest.mark.parametrize(
    ("kind", "on_kill", "lora"),
    [
        ("kr", "drop", {}),
        ("random", "hand-off", {}),
        ("kr", "hand-off", KINDS["patterns"]),
        ("kr", "drop", KINDS["dora"]),
        ("kr", "drop", KINDS["pissa"]),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, kind: str, on_kill: str, lora: dict[str, Any]
) -> None:
    settings = {
        **lora,
        "save_every": 1,
        "schedule.on_kill": on_kill,
        "schedule.period": 3,
        "schedule.warmup_steps": 3,
    }
    whole = scheduled(make_config, kind, output_dir=str(tmp_path / "whole"), **settings)
    dlora.simulate(whole)
    broken = scheduled(make_config, kind, output_dir=str(tmp_path / "broken"), **settings)
    with pytest.raises(dlora.Interrupted):
        dlora.simulate(broken, stop=stop_after(2))
    dlora.simulate(broken, resume=True)
    assert_identical(factors_of(broken), factors_of(whole))
    assert_identical(optimizer_of(broken), optimizer_of(whole))
    assert story(broken) == story(whole)
    assert len(active_events(whole)) > 3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("on_kill", ["hand-off", "drop"])
def test_stacked_participants_with_sets_of_their_own_are_separate_runs(
    optimizer: str, on_kill: str
) -> None:
    """Three participants, each with its own scores: after every step each is what it would be
    alone.
    """
    keys: dict[str, Any] = {
        "active_fraction": 0.3,
        "period": 2,
        "warmup_steps": 3,
        "on_kill": on_kill,
        "rewarm_steps": 3,
    }
    section = ScheduleSection(kind="kr", **keys)
    train = TrainSection(optimizer=optimizer, weight_decay=0.1, max_grad_norm=0.5)
    names = ["p", "q", "r"]
    factors, units = one_layer_each(6, 3)
    alone = [
        {name: tensor[i : i + 1].clone() for name, tensor in factors.items()} for i in range(3)
    ]
    together = Training(
        factors, 0, 3, train, schedule_units(section, units, LoraSection(), 0, names)
    )
    single = [
        Training(alone[i], 0, 1, train, schedule_units(section, units, LoraSection(), 0, [name]))
        for i, name in enumerate(names)
    ]
    assert together.units is not None
    for one in (together, *single):
        assert one.units is not None
        one.train_only(frozenset(factors))
        one.units.leave_out()
    generator = torch.Generator().manual_seed(1)
    sets = set()
    for _ in range(12):
        sets.add(tuple(schedule.active for schedule in together.units.schedules))
        gradients = {
            name: torch.randn(tensor.shape, generator=generator) for name, tensor in factors.items()
        }
        for name, gradient in gradients.items():
            for one, value in [
                (together, gradient),
                *((single[i], gradient[i : i + 1]) for i in range(3)),
            ]:
                parameter = one.parameters[name]
                parameter.grad = value.clone() if parameter.requires_grad else None
        for one in (together, *single):
            one.step(0.05, train.max_grad_norm)
        for name, tensor in factors.items():
            for i in range(3):
                torch.testing.assert_close(tensor[i], alone[i][name][0], rtol=1e-6, atol=1e-7)
    assert any(len({*active}) > 1 for active in sets)
    assert together.units.took_part(1) == single[1].units.took_part(0)  # type: ignore[union-attr]
