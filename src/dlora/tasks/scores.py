"""The scores of each task, from what a model predicted for each row."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import scipy.stats
import torch
from torch import Tensor

from dlora.config.tasks import Task, mark_spans
from dlora.data.formats import IGNORED, Example

Scores = dict[str, float]


@dataclass(frozen=True)
class Scored:
    """One participant's scores.

    ``confusion[a][b]``, for a classifier: the number of rows of class a that were predicted as b.
    """

    scores: Scores
    confusion: list[list[int]] | None = None


def predictions(task: Task, logits: Tensor) -> Tensor:
    """What a model with a head predicts for N rows: the most likely class (N,), the number (N,), or
    whether each class is among the row's (N, C), or the most likely class of each token (N, L).
    """
    if task.label == "number":
        return logits.float().squeeze(-1)
    if task.label == "classes":
        return logits > 0
    return logits.argmax(dim=-1)


def scored(
    task: Task, predicted: Tensor, examples: Sequence[Example], names: Sequence[str]
) -> Scored:
    """The scores of ``predicted`` (N, ...), which are `predictions` for N examples.

    ``names``: of the labels, in their order. Classification: accuracy, and f1 of the second class
    when there are two, else the mean over classes. Regression: Pearson's and Spearman's
    correlation. Multi-label: the f1 of all decisions together, and the mean of each class's f1.
    Token classification: accuracy of words, and where the labels mark spans the precision, recall
    and f1 of whole spans, with kind and bounds.
    """
    if task.label == "words":
        return Scored(_of_words(predicted, examples, names))
    labels = torch.tensor([example.labels for example in examples])
    if task.label == "number":
        return Scored(_correlations(predicted, labels))
    if task.label == "classes":
        return Scored(_f1_of_several(predicted, labels))
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


def _correlations(predicted: Tensor, labels: Tensor) -> Scores:
    """Pearson's and Spearman's correlation of two (N,), by scipy. They are 0 where they are not
    defined: for less than two rows, and where all are alike.
    """
    if len(labels) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    pair = predicted.double().numpy(), labels.double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows that are alike
        found = {
            "pearson": scipy.stats.pearsonr(*pair).statistic,
            "spearman": scipy.stats.spearmanr(*pair).statistic,
        }
    return {name: float(one) if math.isfinite(one) else 0.0 for name, one in found.items()}


def _f1_of_several(predicted: Tensor, labels: Tensor) -> Scores:
    """Micro and macro F1 of decisions (N, C), by torchmetrics."""
    # here, because importing it takes a second
    from torchmetrics.functional.classification import multilabel_f1_score

    num_classes = labels.shape[1]
    return {
        f"{average}_f1": multilabel_f1_score(
            predicted.long(), labels.long(), num_labels=num_classes, average=average
        ).item()
        for average in ("micro", "macro")
    }


def _of_words(predicted: Tensor, examples: Sequence[Example], names: Sequence[str]) -> Scores:
    """Accuracy of the words, and precision, recall and f1 of the spans if labels mark spans."""
    right = words = hits = found = due = 0
    for guessed, example in zip(predicted.tolist(), examples, strict=True):
        assert isinstance(example.labels, list)
        places = [place for place, label in enumerate(example.labels) if label != IGNORED]
        true, said = ([names[of[place]] for place in places] for of in (example.labels, guessed))
        right += sum(a == b for a, b in zip(true, said, strict=True))
        words += len(places)
        spans, spans_said = spans_of(true), spans_of(said)
        hits, found, due = (
            hits + len(spans & spans_said),
            found + len(spans_said),
            due + len(spans),
        )
    scores = {"accuracy": right / max(1, words)}
    if mark_spans(names):
        scores |= {
            "f1": 2 * hits / max(1, found + due),
            "precision": hits / max(1, found),
            "recall": hits / max(1, due),
        }
    return scores


def spans_of(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, word after the last) of each span that B-, I-, E-, S- and O mark, as
    seqeval reads them (its default mode, which is that of CoNLL's conlleval): an I- that continues
    nothing begins a span.
    """
    spans, open_kind, start = set(), None, 0
    for place, label in enumerate([*labels, "O"]):
        mark, _, kind = label.partition("-")
        if open_kind is not None and (mark not in ("I", "E") or kind != open_kind):
            spans.add((open_kind, start, place))
            open_kind = None
        if open_kind is None and mark != "O":
            open_kind, start = kind, place
        if mark in ("E", "S"):
            spans.add((kind, start, place + 1))
            open_kind = None
    return spans
