"""A split model beside the whole one, and a training of both, for every schedule and placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dlora.config.training import TrainSection
from dlora.data.batches import Batch
from dlora.lora.active import Scheduled, schedule_units
from dlora.lora.factors import Factors
from dlora.lora.stacked import StackedModel
from dlora.lora.units import renamed
from dlora.train import Group, local_steps
from dlora.wire.split.codec import split_num_bytes
from dlora.wire.split.frames import Begin, SplitFrame
from kit import updates
from kit.bottlenecks import PARTS
from kit.queue_cloud import (
    QueueCloud,
    batch,
    cloud_body,
    config,
    device_half,
    factors,
    link,
    whole_model,
)

SCHEDULES: dict[str, dict[str, Any]] = {
    "kr": {"kind": "kr", "active_fraction": 0.4, "period": 5, "warmup_steps": 6},
    "kr-drop": {
        "kind": "kr",
        "active_fraction": 0.4,
        "period": 5,
        "warmup_steps": 6,
        "on_kill": "drop",
    },
    "random": {"kind": "random", "active_fraction": 0.4, "period": 4},
    "static": {"kind": "static", "units": ["layer.1.attention.self.query"]},
    "probe": {"kind": "probe", "active_fraction": 0.4, "warmup_steps": 4},
}
CORE = {"lora.placement": "core"}


class Both:
    """A device's half beside the whole model, alike to the last bit."""

    def __init__(self, folder: Path, task: str = "classification", /, **overrides: Any) -> None:
        self.config = config(folder, task, **overrides)
        self.whole = whole_model(self.config)
        frame = self.whole.directions or None
        self.half = device_half(self.config, frame)
        self.cloud = QueueCloud(cloud_body(folder, frame))

    def scheduled(self) -> Scheduled | None:
        if self.config.schedule.kind == "all":
            return None
        units = [renamed(unit, self.half.model.body.prefix) for unit in self.half.agreement.units]
        return schedule_units(
            self.config.schedule, units, self.config.adapter_section, 0, ["phone"]
        )


class Watched:
    """The frames of a training, with the units of each call."""

    def __init__(self, both: Both) -> None:
        self.frames: list[SplitFrame] = []
        self.units: dict[int, tuple[int, ...]] = {}
        link(both.half, both.cloud, 2, seen=self._seen)

    def _seen(self, up: bool, frame: SplitFrame) -> None:
        self.frames.append(frame)
        if isinstance(frame, Begin):
            self.units[frame.call] = frame.units

    def num_bytes(self) -> int:
        return sum(split_num_bytes(frame, "float32") for frame in self.frames)


def train(
    model: StackedModel,
    steps: list[list[Batch]],
    scheduled: Scheduled | None,
    optimizer: str = "adamw",
) -> tuple[Tensor, Factors]:
    """Losses, and what the steps changed."""
    rate = {"adamw": 5e-3, "sgd": 0.1}[optimizer]
    section = TrainSection(optimizer=optimizer, learning_rate=rate, weight_decay=0.01)
    values = factors(model)
    before = {name: value.detach().clone() for name, value in values.items()}
    group = Group(values, 0, 1, section, scheduled)
    group.train_only(frozenset(values))
    losses = local_steps(
        model, group, steps, [rate * (1 - step / len(steps)) for step in range(len(steps))], section
    )
    return losses, {name: group.parameters[name].detach() - before[name] for name in values}


def some_steps(count: int, task: str = "classification") -> list[list[Batch]]:
    return [[batch(task, seed=100 * step % 700)] for step in range(count)]


def assert_same(
    split: tuple[Tensor, Factors], whole: tuple[Tensor, Factors], optimizer: str = "adamw"
) -> None:
    assert (split[0] - whole[0]).abs().max() < updates.LOSS_BOUND
    assert (whole[0][-1] - whole[0][0]).abs() > 1e-3  # it moved
    for part in ("lora_A", "lora_B", "lora_M", *PARTS, "classifier"):
        if any(part in name for name in whole[1]):
            assert (
                updates.relative_difference(split[1], whole[1], part)
                < updates.UPDATE_BOUND[optimizer]
            ), part
