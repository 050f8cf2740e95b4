"""What travels between a device and its cloud, and that two devices never meet."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlora.data.batches import Batch
from dlora.lora.factors import Factors
from dlora.split.device.half import Half
from dlora.wire.split.frames import Begin, SplitFrame, Values
from kit.queue_cloud import QueueCloud, batch, config, device_half, factors, link
from kit.split_steps import cloud_of, step_of
from kit.split_training import some_steps, train

Folder = Callable[[str, str], Path]


# What travels


def watched_step(
    half: Half, cloud: QueueCloud, given: Batch, pipeline: int = 1
) -> list[tuple[bool, SplitFrame]]:
    seen: list[tuple[bool, SplitFrame]] = []
    link(half, cloud, pipeline, seen=lambda up, frame: seen.append((up, frame)))
    step_of(half.model, factors(half.model), given)
    return [(up, frame) for up, frame in seen if isinstance(frame, Begin | Values)]


def test_groups_share_frames_and_nothing_goes_below_the_lowest(model_folder: Folder) -> None:
    own = config(model_folder("llama", "causal-lm"), "causal-lm")
    half, given = device_half(own), batch("causal-lm")
    names = [[name.rpartition(".")[2] for name in unit.modules] for unit in half.agreement.units]
    assert names == 2 * [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    frames = watched_step(half, cloud_of(own), given)
    values = [(frame.what, frame.unit) for _, frame in frames if isinstance(frame, Values)]
    assert Counter(values) == Counter(
        [(what, unit) for what in ("input", "update", "update-gradient") for unit in range(8)]
        # none of unit 0: below it nothing trains
        + [("input-gradient", unit) for unit in range(1, 8)]
        + [("hidden", 0), ("hidden-gradient", 0)]
    )
    tokens = int(given.attention_mask.sum())
    for _, frame in frames:
        if isinstance(frame, Values) and not frame.what.startswith("hidden"):
            unit = half.agreement.units[frame.unit]
            width = unit.in_features if frame.what.startswith("input") else unit.width
            assert tuple(frame.tensor.shape) == (tokens, width)


def test_only_active_modules_travel(model_folder: Folder) -> None:
    own = config(
        model_folder("bert", "classification"),
        **{"lora.target_modules": r".*layer\.1.*(query|value)"},
    )
    frames = watched_step(half := device_half(own), cloud_of(own), batch())
    assert [unit.modules for unit in half.agreement.units] == [
        ("encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.value")
    ]
    assert [frame.what for up, frame in frames if isinstance(frame, Values)] == [
        "input", "update", "hidden", "hidden-gradient", "update-gradient",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "task", "rows"),
    [
        ("bert", "classification", 4),
        ("roberta", "classification", 4),
        ("llama", "classification", 4),
        ("llama", "causal-lm", 6),
    ],
)
def test_hidden_comes_only_where_the_loss_looks(
    model_folder: Folder, family: str, task: str, rows: int
) -> None:
    own = config(model_folder(family, task), task)
    given = batch(task)
    if task == "causal-lm":
        # of four texts the targets 1 and 2, which positions 0 and 1 foretell
        given.labels[:, 3:] = -100
        given.labels[0] = -100
    frames = watched_step(device_half(own), cloud_of(own), given, pipeline=2)
    for what in ("hidden", "hidden-gradient"):
        found = [
            len(frame.tensor)
            for _, frame in frames
            if isinstance(frame, Values) and frame.what == what
        ]
        # a row without a target may send one for form
        assert len(found) == 2 and sum(found) in (rows, rows + 1)


# Two devices


def test_two_devices_never_see_each_others_numbers(model_folder: Folder) -> None:
    own = config(
        model_folder("bert", "classification"), pooling="mean", **{"train.model_dropout": 0.1}
    )
    cloud = cloud_of(own)

    def life(seed: int, meet: Callable[[], object]) -> tuple[torch.Tensor, Factors]:
        half = halves_of[seed]
        calls = link(half, cloud, 2, device=f"phone-{seed}", seen=lambda up, frame: meet())
        # torch's own generator is one for all threads
        seeds, plain = itertools.count(1000 * seed), calls.forward
        calls.forward = lambda request, keep: plain(replace(request, seed=next(seeds)), keep)  # type: ignore[method-assign]
        values = factors(half.model, seed)
        return train(half.model, values, some_steps(4, lengths=(3 + seed, 5, 4)), "sgd")

    halves_of = [device_half(own) for _ in range(2)]
    alone = [life(seed, lambda: None) for seed in range(2)]
    halves_of = [device_half(own) for _ in range(2)]
    together: dict[int, tuple[torch.Tensor, Factors]] = {}
    turns = threading.Barrier(2)

    def take_turns() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            turns.wait(timeout=0.5)  # frame by frame side by side, as long as both have some

    def run(seed: int) -> None:
        together[seed] = life(seed, take_turns)
        turns.abort()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        assert torch.equal(together[seed][0], alone[seed][0])
        assert all(
            torch.equal(value, alone[seed][1][name]) for name, value in together[seed][1].items()
        )
    assert not torch.equal(alone[0][0], alone[1][0])


@pytest.mark.parametrize("what", ["update", "hidden-gradient", "input-gradient"])
def test_a_stalled_device_stops_nobody(model_folder: Folder, what: str) -> None:
    """One device is silent in the midst of its forward or backward while another one trains."""
    own = config(model_folder("bert", "classification"))
    cloud, stalled, resume = cloud_of(own), threading.Event(), threading.Event()

    def stall(up: bool, frame: SplitFrame) -> None:
        if isinstance(frame, Values) and frame.what == what and not stalled.is_set():
            stalled.set()
            assert resume.wait(30)

    slow, quick = device_half(own), device_half(own)
    link(slow, cloud, device="slow", seen=stall)
    link(quick, cloud, device="quick")
    found: list[tuple[torch.Tensor, Factors]] = []
    thread = threading.Thread(
        target=lambda: found.append(step_of(slow.model, factors(slow.model), batch()))
    )
    thread.start()
    assert stalled.wait(30)
    ours = step_of(quick.model, factors(quick.model), batch())  # would never end if it had to wait
    assert not found
    resume.set()
    thread.join()
    assert torch.equal(found[0][0], ours[0]) and all(
        torch.equal(found[0][1][name], value) for name, value in ours[1].items()
    )
