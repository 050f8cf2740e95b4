"""The scores of each task, from what a model predicted for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlora.config.tasks import Task
from dlora.data.formats import Example

Scores = dict[str, float]


@dataclass(frozen=True)
class Scored:
    """One participant's scores.

    ``confusion[a][b]``, for a classifier: the number of rows of class a that were predicted as b.
    """

    scores: Scores
    confusion: list[list[int]] | None = None


def predictions(task: Task, logits: Tensor) -> Tensor:
    """What a model with a head predicts for N rows: the most likely class (N,)."""
    return logits.argmax(dim=-1)


def scored(
    task: Task, predicted: Tensor, examples: Sequence[Example], names: Sequence[str]
) -> Scored:
    """The scores of ``predicted`` (N, ...), which are `predictions` for N examples.

    ``names``: of the labels, in their order. Classification: accuracy, and f1 of the second class
    when there are two, else the mean over classes.
    """
    labels = torch.tensor([example.labels for example in examples])
    confusion = _confusion(predicted, labels, len(names))
    return Scored(_classification(confusion), confusion.tolist())


def _confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Numbers of rows by true class and predicted class: (N,), (N,) -> (C, C)."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(
        num_classes, num_classes
    )


def _classification(confusion: Tensor) -> Scores:
    """Accuracy and F1 from the confusion counts (C, C)."""
    hits, named = confusion.diagonal(), confusion.sum(dim=0) + confusion.sum(dim=1)
    f1 = [
        2 * hit / name if name else 0.0
        for hit, name in zip(hits.tolist(), named.tolist(), strict=True)
    ]
    return {
        "accuracy": hits.sum().item() / confusion.sum().item(),
        "f1": f1[1] if len(f1) == 2 else sum(f1) / len(f1),
    }
