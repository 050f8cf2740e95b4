"""Single steps of a split model, beside those of the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dlora.config.run import Config
from dlora.data.batches import Batch
from dlora.lora.factors import Factors
from dlora.lora.stacked import StackedModel
from dlora.split.cloud.body import Body
from dlora.split.device.half import Half
from dlora.tasks.losses import num_targets, summed_loss
from dlora.train import forward
from kit.queue_cloud import QueueCloud, cloud_body

BODIES: dict[Path, Body] = {}  # a body is read once; nothing of a device stays in it


def cloud_of(config: Config, **arguments: Any) -> QueueCloud:
    folder = Path(config.model)
    if folder not in BODIES:
        BODIES[folder] = cloud_body(folder)
    return QueueCloud(BODIES[folder], **arguments)


def step_of(model: StackedModel, values: Factors, own_batch: Batch) -> tuple[torch.Tensor, Factors]:
    """Loss and gradients of one backward."""
    model.use(values)
    labels = own_batch.labels
    loss = summed_loss(model.task, forward(model, own_batch), labels, 1) / num_targets(
        model.task, labels, 1
    )
    loss.sum().backward()
    return loss.detach(), {
        name: value.grad.clone() for name, value in values.items() if value.grad is not None
    }


def loss_of(half: Half, given: Batch) -> torch.Tensor:
    return F.cross_entropy(forward(half.model, given), given.labels)
