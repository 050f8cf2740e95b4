"""Scores adapters: those of single peers, the average adapter, and the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlora.data.batches import collate
from dlora.data.formats import Choice, Example
from dlora.lora.stacked import StackedModel
from dlora.train import autocast, forward, num_targets, summed_loss

Scores = dict[str, float]
_Batch = tuple[Tensor, Tensor, list[int]]


@dataclass(frozen=True)
class Scored:
    """One participant's scores.

    ``confusion[a][b]``, for a classifier: the number of rows of class a that were predicted as b.
    """

    scores: Scores
    confusion: list[list[int]] | None = None


@torch.no_grad()
def evaluate(
    model: StackedModel,
    factors: Mapping[str, Tensor],
    examples: Sequence[Example],
    choices: Sequence[Choice],
    *,
    pad_token_id: int,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    killed: frozenset[int] = frozenset(),
    rank: int = 0,
    ranks: int = 1,
    gathered: Callable[[list[_Batch]], list[list[_Batch]]] = lambda own: [own],
) -> list[Scored]:
    """Score the P participants of ``factors`` ((P, ...) each) on ``examples``, all P together.

    Returns one `Scored` for each participant. Classification: accuracy, f1 (of the second class
    when there are two, else the mean over classes) and mean loss. Causal-lm: loss and perplexity
    per target token; with ``choices`` also accuracy, where the most likely option is the answer.
    ``batch_size``: examples of one participant in a forward pass, which has P times as many rows.
    ``on_batch(done, total)`` is called with numbers of examples, before the first batch and after
    each. ``killed``: numbers of the units that are not trained, as for `StackedModel.use`.
    ``ranks``: how many processes score these participants, each a part of the batches; this one is
    number ``rank``. ``gathered`` returns what each of them found, in their order.
    """
    model.network.eval()
    num_participants = len(next(iter(factors.values())))
    options = [option for choice in choices for option in choice.options]
    total = len(examples) + len(options)
    on_batch(0, total)

    def batches(rows: Sequence[Example], already: int) -> list[_Batch]:
        """For each batch of N rows: losses (P, N), predictions (P, N) and N indices of ``rows``."""
        model.use(factors, killed)
        found: list[_Batch] = []
        done, dealt = already, batches_of(rows, batch_size)
        for chosen in dealt[rank::ranks]:
            batch = collate([rows[index] for index in chosen] * num_participants, pad_token_id).to(
                model.device
            )
            with autocast(model.device, autocast_dtype):
                logits = forward(model, batch)
            losses, predictions = (
                one.view(num_participants, -1) for one in _reduce(logits, batch.labels)
            )
            found.append((losses, predictions, chosen))
            done += len(chosen)
            on_batch(done, total)
        of_each = gathered(found)
        return [of_each[number % ranks][number // ranks] for number in range(len(dealt))]

    scored = batches(examples, 0)
    losses = [
        sum(of[participant].sum().item() for of, _, _ in scored)
        for participant in range(num_participants)
    ]
    if not isinstance(examples[0].labels, list):
        predicted = torch.empty(num_participants, len(examples), dtype=torch.long)
        for _, predictions, chosen in scored:
            predicted[:, chosen] = predictions
        labels, num_classes = (
            torch.tensor([example.labels for example in examples]),
            model.network.config.num_labels,
        )
        confusions = [_confusion(one, labels, num_classes) for one in predicted]
        return [
            Scored(_classification(confusion) | {"loss": loss / len(examples)}, confusion.tolist())
            for confusion, loss in zip(confusions, losses, strict=True)
        ]
    targets = sum(num_targets(torch.tensor([example.labels]), 1).item() for example in examples)
    targets = max(1, targets)
    scores = [
        {"loss": loss / targets, "perplexity": math.exp(min(loss / targets, 700.0))}
        for loss in losses
    ]
    if choices:
        log_likelihood = torch.empty(num_participants, len(options))
        for of, _, chosen in batches(options, len(examples)):
            log_likelihood[:, chosen] = -of
        starts = torch.tensor([0, *(len(choice.options) for choice in choices)]).cumsum(0).tolist()
        for participant, own in enumerate(log_likelihood):
            right = sum(
                own[start : start + len(choice.options)].argmax().item() == choice.answer
                for start, choice in zip(starts, choices, strict=False)
            )
            scores[participant]["accuracy"] = right / len(choices)
    return [Scored(each) for each in scores]


def batches_of(rows: Sequence[Example], batch_size: int) -> list[list[int]]:
    """The indices of ``rows`` in batches; rows of similar length are together to save padding."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    return [order[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def primary_metric(scores: Scores) -> str:
    """The score that decides which adapter is best: accuracy if there is one, else loss."""
    return "accuracy" if "accuracy" in scores else "loss"


def better(scores: Scores, than: Scores) -> bool:
    """Whether ``scores`` are strictly better by the primary metric."""
    metric = primary_metric(scores)
    return scores[metric] > than[metric] if metric == "accuracy" else scores[metric] < than[metric]


def mean_scores(peers: Mapping[str, Scores]) -> Scores:
    """The mean over peers of each score."""
    names = next(iter(peers.values()))
    return {name: sum(scores[name] for scores in peers.values()) / len(peers) for name in names}


def standard_errors(peers: Mapping[str, Scores], num_peers: int) -> Scores | None:
    """Standard errors of `mean_scores` for a sample of ``num_peers`` peers, drawn without
    replacement. None for a single peer and for all of them.
    """
    count = len(peers)
    if not 1 < count < num_peers:
        return None
    means = mean_scores(peers)
    return {
        name: math.sqrt(
            sum((scores[name] - mean) ** 2 for scores in peers.values())
            / (count - 1)
            / count
            * (1 - count / num_peers)
        )
        for name, mean in means.items()
    }


def _reduce(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(summed loss of each example (N,), its most likely class (N,)), on the CPU.

    For a language model, which has no classes, the second tensor is the loss again.
    """
    losses = summed_loss(logits, labels, len(labels)).cpu()
    return losses, logits.argmax(dim=-1).cpu() if logits.dim() == 2 else losses


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
