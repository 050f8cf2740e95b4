"""Bottleneck adapters with a cloud: laws 6 and 7 over queues and TLS, and what is handed off."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dlora
from dlora.split.tensors import as_factors
from dlora.wire.split.codec import split_num_bytes
from dlora.wire.split.frames import ACTIVE, LEFT_OUT, HandOff, Values
from kit import queue_cloud
from kit.both_halves import SCHEDULES, Both, Watched, assert_same, some_steps, train
from kit.bottlenecks import PARTS, Hooked, outputs
from kit.connected import batches, connected
from kit.connected import train as train_anyhow
from kit.processes import Split, running
from kit.queue_cloud import factors, link
from kit.serving_cloud import Members, serving
from kit.updates import LOSS_BOUND, UPDATE_BOUND, relative_difference

pytestmark = pytest.mark.usefixtures("no_page")
Folder = Callable[[str, str], Path]


def keys(activation: str = "gelu", schedule: str | None = None) -> dict[str, Any]:
    section = {"schedule": SCHEDULES[schedule]} if schedule else {}
    return {"lora": {}, "bottleneck": {"r": 4, "activation": activation}, **section}


@pytest.mark.parametrize(
    ("family", "task", "activation", "schedule", "optimizer"),
    [
        ("bert", "classification", "gelu", None, "adamw"),
        ("bert", "classification", "silu", "kr", "adamw"),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [
                ("bert", "classification", "relu", "kr-drop", "sgd"),
                ("bert", "classification", "gelu", "random", "sgd"),
                ("roberta", "classification", "silu", None, "sgd"),
                ("llama", "causal-lm", "silu", None, "adamw"),
                ("llama", "causal-lm", "silu", "kr", "adamw"),
                ("opt", "causal-lm", "relu", None, "sgd"),
                ("gpt2", "causal-lm", "gelu", "kr-drop", "sgd"),
            ]
        ),
    ],
)
def test_split_is_unsplit(
    model_folder: Folder,
    family: str,
    task: str,
    activation: str,
    schedule: str | None,
    optimizer: str,
) -> None:
    """Law 6, against the whole model in one process, which is the written-out one by law 1."""
    both = Both(model_folder(family, task), task, **keys(activation, schedule))
    link(both.half, both.cloud, 2)
    ours, theirs, steps = both.scheduled(), both.scheduled(), some_steps(20, task)
    split = train(both.half.model, steps, ours, optimizer)
    assert_same(split, train(both.whole, steps, theirs, optimizer), optimizer)
    if ours is not None and theirs is not None:
        assert ours.schedules[0].state()["changed_at"] == theirs.schedules[0].state()["changed_at"]


@pytest.mark.parametrize("kind", ["kr", "kr-drop"])
def test_a_killed_unit_moves_no_byte(model_folder: Folder, kind: str) -> None:
    """Law 7: it is handed off once a kill, or left out."""
    both = Both(model_folder("bert", "classification"), **keys(schedule=kind))
    watched, killed_once = Watched(both), set()
    train(both.half.model, some_steps(20), both.scheduled())
    for frame in watched.frames:
        if isinstance(frame, Values) and frame.what not in ("hidden", "hidden-gradient"):
            assert watched.units[frame.call][frame.unit] == ACTIVE
            assert frame.tensor.shape[1] == 64  # one linear's output, up and down
    for units in watched.units.values():
        killed_once |= {number for number, unit in enumerate(units) if unit != ACTIVE}
    assert killed_once == {0, 1, 2, 3}
    hand_offs = [frame for frame in watched.frames if isinstance(frame, HandOff)]
    assert len({(frame.unit, frame.version) for frame in hand_offs}) == len(hand_offs)
    # the whole little network, with both biases
    assert {frame.tensor.numel() for frame in hand_offs} <= {2 * 4 * 64 + 4 + 64}
    assert bool(hand_offs) == (kind == "kr")
    if kind == "kr-drop":
        assert all(set(units) <= {ACTIVE, LEFT_OUT} for units in watched.units.values())


def test_everything_active_is_no_kill_and_revive(model_folder: Folder) -> None:
    """The same frames, to the byte, and the same numbers, to the bit."""
    all_active = {"kind": "kr", "active_fraction": 1.0, "period": 3, "warmup_steps": 1}
    plain, full = (
        Both(model_folder("bert", "classification"), **keys(), **section)
        for section in ({}, {"schedule": all_active})
    )
    watched = Watched(plain), Watched(full)
    results = [train(both.half.model, some_steps(8), both.scheduled()) for both in (plain, full)]
    one, other = (
        sum(split_num_bytes(frame, "float32") for frame in seen.frames) for seen in watched
    )
    assert one == other
    assert all(torch.equal(results[0][1][name], update) for name, update in results[1][1].items())


def test_what_is_handed_off_is_what_was_trained(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"), **keys())
    adapter = link(both.half, both.cloud).adapter
    both.half.model.use(values := factors(both.half.model))
    unit, agreement = adapter.units[0], both.half.agreement
    handed = as_factors(adapter.handed_off(adapter.factors(), 0), unit, agreement)
    assert handed is not None
    for part, tensor in zip(PARTS, handed[0], strict=True):
        assert torch.equal(tensor, values[f"bert.{unit.modules[0]}.{part}"][0])
    assert as_factors(torch.zeros(1, 2 * 4 * 64), unit, agreement) is None  # without biases
    assert not adapter.is_zero(adapter.factors(), 0)
    values[f"bert.{unit.modules[0]}.up_weight"].data.zero_()
    assert not adapter.is_zero(adapter.factors(), 0)  # its bias still adds something
    values[f"bert.{unit.modules[0]}.up_bias"].data.zero_()
    assert adapter.is_zero(adapter.factors(), 0)


@pytest.mark.slow
def test_anybodys_training_loop_is_the_written_out_adapter(
    tmp_path: Path, model_folder: Folder
) -> None:
    """Law 6 for `dlora.connect`, through TLS; the saved folder loads by the code on its card."""
    folder, members = model_folder("bert", "classification"), Members(tmp_path)
    labels = {"split.cloud": "hub", "data.labels": ["no", "yes"]}
    settings = queue_cloud.config(folder, "classification", **labels, **keys("silu"))
    hooked = Hooked(settings, outputs("bert"))
    expected = train_anyhow(hooked.model, "bert")
    with serving(members, folder), connected(members, settings) as model:
        losses = train_anyhow(model, "bert")
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < LOSS_BOUND
        model.save_pretrained(tmp_path / "saved")
        [batch] = batches("bert", 1)
        with torch.no_grad():
            logits = model.eval()(**batch).logits
    saved = load_file(tmp_path / "saved" / "bottleneck.safetensors")
    ours = {name: saved[name] - value for name, value in hooked.initial.items()}
    for part in (*PARTS, "classifier"):
        assert relative_difference(ours, hooked.update(), part) < UPDATE_BOUND["adamw"], part
    text = (tmp_path / "saved" / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"base": settings.model, "folder": str(tmp_path / "saved")}
    exec(code, names)
    with torch.no_grad():
        loaded = names["model"].eval()(**batch).logits
    torch.testing.assert_close(logits, loaded, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [None, "kr"])
def test_a_device_ends_where_a_run_without_any_cloud_ends(
    tmp_path: Path, model_folder: Folder, schedule: str | None
) -> None:
    """`dlora cloud` and `dlora device` over TLS, against `simulate` with the whole model."""
    changes = {**keys("silu", schedule), "train.rounds": 8}
    split = Split(tmp_path, model_folder("bert", "classification"), changes)
    with running(split):
        split.start_hub()
        split.start("phone")
        outcome = split.finish("phone")
        assert (outcome.exit_code, outcome.err) == (0, ""), outcome
    alone = split.config("phone", {"split": None, "output_dir": str(tmp_path / "alone")})
    dlora.simulate(alone)
    hooked = Hooked(alone, outputs("bert"))
    ours, reference = (
        {
            name: tensor - hooked.initial[name]
            for name, tensor in load_file(run / "consensus" / "bottleneck.safetensors").items()
        }
        for run in (split.run("phone"), tmp_path / "alone")
    )
    for part in (*PARTS, "classifier"):
        assert relative_difference(ours, reference, part) < UPDATE_BOUND["adamw"], part
