"""A training through a cloud beside the same one on the whole model."""

from __future__ import annotations

from typing import Any

import torch

from dlora.config.training import TrainSection
from dlora.data.batches import Batch
from dlora.lora.factors import Factors
from dlora.lora.stacked import StackedModel
from dlora.train import Group, learning_rate, local_steps
from kit import updates
from kit.queue_cloud import batch


def train(
    model: StackedModel,
    values: Factors,
    steps: list[list[Batch]],
    optimizer: str,
    frozen: str = "nothing",
) -> tuple[torch.Tensor, Factors]:
    """Losses, and what the steps changed; rates, warm-up and schedule are those of law 1."""
    rate = {"adamw": 5e-3, "sgd": 0.1}[optimizer]
    section = TrainSection(
        optimizer=optimizer,
        learning_rate=rate,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        warmup_steps=5,
    )
    rates = [learning_rate(section, step, len(steps)) for step in range(len(steps))]
    group = Group(values, 0, 1, section)
    group.train_only(
        frozenset(
            name for name in values if not name.endswith(frozen) and name not in model.frozen_head
        )
    )
    before = {name: value.detach().clone() for name, value in values.items()}
    losses = local_steps(model, group, steps, rates, section)
    return losses, {name: group.parameters[name].detach() - before[name] for name in values}


def some_steps(
    count: int, task: str = "classification", micro_batches: int = 1, **arguments: Any
) -> list[list[Batch]]:
    return [
        [batch(task, seed=100 * step % 700 + micro, **arguments) for micro in range(micro_batches)]
        for step in range(count)
    ]


def assert_same_training(
    split: tuple[torch.Tensor, Factors],
    whole: tuple[torch.Tensor, Factors],
    optimizer: str,
    frozen: str = "nothing",
) -> None:
    assert (split[0] - whole[0]).abs().max() < updates.LOSS_BOUND
    assert (whole[0][-1] - whole[0][0]).abs() > 1e-3  # it moved
    parts = [
        part
        for part in ("lora_A", "lora_B", "classifier", "score")
        if any(part in name for name in whole[1])
    ]
    for part in parts:
        if part == frozen:
            assert all(not split[1][name].any() for name in split[1] if part in name)
        else:
            assert (
                updates.relative_difference(split[1], whole[1], part)
                < updates.UPDATE_BOUND[optimizer]
            ), part


def assert_same_step(
    ours: tuple[torch.Tensor, Factors], theirs: tuple[torch.Tensor, Factors]
) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=2e-6, msg=name)
