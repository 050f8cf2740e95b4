"""The loss of each task, summed over each participant's targets, and how many targets there are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.config.tasks import Task
from dlora.data.formats import IGNORED


def summed_loss(task: Task, logits: Tensor, labels: Tensor, num_participants: int) -> Tensor:
    """The loss summed over each participant's targets: (P,). Labels of -100 are no targets.

    ``logits``: (P x B, classes), or (P x B, L, classes or vocabulary) for tokens; ``labels``:
    (P x B,), (P x B, classes) of zeros and ones for multi-label, or (P x B, L). Each loss is that
    of transformers; multi-label has a target for each class.
    """
    if task.loss == "squared-error":
        return (logits.float().squeeze(-1) - labels).square().view(num_participants, -1).sum(dim=1)
    if task.loss == "binary-cross-entropy":
        each = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
        return each.view(num_participants, -1).sum(dim=1)
    if task.shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.view(num_participants, -1).sum(dim=1)


def num_targets(task: Task, labels: Tensor, num_participants: int) -> Tensor:
    """How many targets each participant has: (P,). ``labels`` as for `summed_loss`."""
    if task.loss != "cross-entropy":
        return torch.full((num_participants,), labels.numel() // num_participants)
    counted = labels[:, 1:] if task.shifted else labels
    return (counted.reshape(num_participants, -1) != IGNORED).sum(dim=1)
