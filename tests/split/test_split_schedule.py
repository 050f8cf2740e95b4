"""Laws 6 and 7 for every schedule and placement: the halves do what the whole model does, killed
units cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dlora
from dlora.lora.core import directions_of
from dlora.split.agreement import agree, proposal_text
from dlora.wire.split.frames import ACTIVE, LEFT_OUT, HandOff, Values
from kit.both_halves import CORE, SCHEDULES, Both, Watched, assert_same, some_steps, train
from kit.queue_cloud import config, link
from kit.updates import KINDS

pytestmark = pytest.mark.usefixtures("no_page")
Folder = Callable[[str, str], Path]


@pytest.mark.parametrize(
    ("schedule", "placement", "optimizer"),
    [
        ("kr", {}, "adamw"),
        pytest.param("kr", {}, "sgd", marks=pytest.mark.slow),
        ("kr-drop", {}, "adamw"),
        ("static", {}, "adamw"),
        (None, CORE, "adamw"),
        ("kr", KINDS["patterns"], "adamw"),
        pytest.param("random", KINDS["rslora"], "adamw", marks=pytest.mark.slow),
        pytest.param("random", {}, "adamw", marks=pytest.mark.slow),
        pytest.param("probe", {}, "adamw", marks=pytest.mark.slow),
    ],
)
def test_split_is_unsplit(
    model_folder: Folder, schedule: str | None, placement: dict[str, Any], optimizer: str
) -> None:
    """Law 6: losses and updates of 20 steps, and who was active in each of them."""
    section = {"schedule": SCHEDULES[schedule]} if schedule else {}
    both = Both(model_folder("bert", "classification"), **section, **placement)
    link(both.half, both.cloud, 2)
    ours, theirs = both.scheduled(), both.scheduled()
    steps = some_steps(20)
    split = train(both.half.model, steps, ours, optimizer)
    assert_same(split, train(both.whole, steps, theirs, optimizer), optimizer)
    if ours is not None and theirs is not None:
        assert ours.schedules[0].state()["changed_at"] == theirs.schedules[0].state()["changed_at"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("section", [{"schedule": SCHEDULES["kr"]}, CORE], ids=["kr", "core"])
@pytest.mark.slow
def test_split_is_unsplit_for_language_models(
    model_folder: Folder, family: str, section: dict[str, Any]
) -> None:
    both = Both(model_folder(family, "causal-lm"), "causal-lm", **section)
    link(both.half, both.cloud, 3)
    steps = some_steps(12, "causal-lm")
    assert_same(
        train(both.half.model, steps, both.scheduled()), train(both.whole, steps, both.scheduled())
    )


# Law 7


@pytest.mark.parametrize("kind", ["kr", "kr-drop", "random"])
def test_a_killed_unit_moves_no_byte(model_folder: Folder, kind: str) -> None:
    both = Both(model_folder("bert", "classification"), schedule=SCHEDULES[kind])
    watched, scheduled, killed_once = Watched(both), both.scheduled(), set()
    train(both.half.model, some_steps(20), scheduled)
    for frame in watched.frames:
        if isinstance(frame, Values) and frame.what not in ("hidden", "hidden-gradient"):
            assert watched.units[frame.call][frame.unit] == ACTIVE
    for units in watched.units.values():
        killed_once |= {number for number, unit in enumerate(units) if unit != ACTIVE}
    assert len(killed_once) == len(both.half.agreement.units)  # each had its turn to rest
    hand_offs = [frame for frame in watched.frames if isinstance(frame, HandOff)]
    # once a kill
    assert len({(frame.unit, frame.version) for frame in hand_offs}) == len(hand_offs)
    if kind == "kr-drop":
        assert not hand_offs and all(
            set(units) <= {ACTIVE, LEFT_OUT} for units in watched.units.values()
        )
    else:
        assert hand_offs


def test_everything_active_is_no_kill_and_revive(model_folder: Folder) -> None:
    """The same frames, to the byte, and the same factors, to the bit."""
    plain, full = (
        Both(model_folder("bert", "classification"), **section)
        for section in (
            {},
            {"schedule": {"kind": "kr", "active_fraction": 1.0, "period": 3, "warmup_steps": 1}},
        )
    )
    watched = Watched(plain), Watched(full)
    results = [train(both.half.model, some_steps(8), both.scheduled()) for both in (plain, full)]
    assert watched[0].num_bytes() == watched[1].num_bytes()
    assert all(torch.equal(results[0][1][name], update) for name, update in results[1][1].items())


# The core


def test_a_core_moves_r_numbers_a_token_and_module(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"), **CORE)
    watched = Watched(both)
    train(both.half.model, some_steps(1), None)
    r = both.config.lora.r
    for frame in watched.frames:
        if isinstance(frame, Values) and frame.what not in ("hidden", "hidden-gradient"):
            assert frame.tensor.shape[1] == r * len(both.half.agreement.units[frame.unit].modules)


def test_halves_with_different_frames_do_not_agree(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"), **CORE)
    body, proposal = both.cloud.body, proposal_text(both.half.facts, both.half.agreement)

    def answer(frame: dict[str, Tensor]) -> object:
        return agree(proposal, body.facts, body.units, frame)

    assert answer(body.directions) == both.half.agreement
    assert "this cloud has no frame" in str(answer({}))
    assert "the device has 4, the cloud's frame 3" in str(
        answer({name: tensor[:3] for name, tensor in body.directions.items()})
    )
    name = next(iter(body.directions))
    other = body.directions | {name: body.directions[name] * 1.0001}
    assert "the device's is not the cloud's; copy the cloud's file" in str(answer(other))
    some = {name: tensor for name, tensor in body.directions.items() if "query" in name}
    assert "the cloud's has no encoder.layer.0.attention.self.key" in str(answer(some))


def test_dropout_with_what_the_cloud_computes_is_refused(model_folder: Folder) -> None:
    folder = model_folder("bert", "classification")
    for section in (CORE, {"schedule": SCHEDULES["kr"]}):
        with pytest.raises(
            dlora.UserError, match="the cloud reads the inputs itself|the cloud reads inputs itself"
        ):
            config(folder, **section | {"lora.lora_dropout": 0.1})
    config(folder, **{"schedule": SCHEDULES["kr-drop"], "lora.lora_dropout": 0.1})


def test_a_frame_is_found_by_its_names_in_the_body_or_around_it(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"), **CORE)
    layers = dict(both.whole.network.named_modules())
    names = sorted({name.rpartition(".")[0] for name in both.whole.directions})
    linears = {name: layers[name].base_layer for name in names}
    within = {name.partition(".")[2]: tensor for name, tensor in both.whole.directions.items()}
    for given in (
        both.whole.directions,
        within,
        {f"model.{name}": tensor for name, tensor in within.items()},
    ):
        found = directions_of(given, linears, 4)
        assert found.keys() == both.whole.directions.keys()
