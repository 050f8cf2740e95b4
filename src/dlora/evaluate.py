"""Scores: of one peer, of the average, of the pooled baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dlora.data import collate
from dlora.formats import Choice, Example
from dlora.lora.stacked import StackedModel
from dlora.train import autocast, forward, num_targets, summed_loss

Scores = dict[str, float]


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
) -> Scores:
    """Score one participant's factors ((1, ...) each) on ``examples``.

    Classification: accuracy, f1 (of the second class when there are two, else the mean over classes) and mean loss.
    Causal-lm: loss and perplexity a target token; with ``choices`` also accuracy, the answer being the likeliest option.
    ``on_batch`` hears (examples done, examples in all). ``killed``: units whose factors rest, as `StackedModel.use` takes them.
    """
    model.use(factors, killed)
    model.network.eval()
    options = [option for choice in choices for option in choice.options]
    total = len(examples) + len(options)

    def batches(rows: Sequence[Example], already: int) -> list[tuple[Tensor, Tensor, list[int]]]:
        """Losses, predictions and indices of ``rows``, a batch at a time."""
        results, done = [], already
        for chosen in batches_of(rows, batch_size):
            batch = collate([rows[index] for index in chosen], pad_token_id).to(model.device)
            with autocast(model.device, autocast_dtype):
                logits = forward(model, batch)
            results.append((*_reduce(logits, batch.labels), chosen))
            done += len(chosen)
            on_batch(done, total)
        return results

    scored = batches(examples, 0)
    loss = sum(losses.sum().item() for losses, _, _ in scored)
    if not isinstance(examples[0].labels, list):
        predicted = torch.empty(len(examples), dtype=torch.long)
        for _, predictions, chosen in scored:
            predicted[chosen] = predictions
        labels = torch.tensor([example.labels for example in examples])
        return _classification(predicted, labels, model.network.config.num_labels) | {"loss": loss / len(examples)}
    targets = sum(num_targets(torch.tensor([example.labels]), 1).item() for example in examples)
    scores = {"loss": loss / targets, "perplexity": math.exp(min(loss / targets, 700.0))}
    if choices:
        log_likelihood = torch.empty(len(options))
        for losses, _, chosen in batches(options, len(examples)):
            log_likelihood[chosen] = -losses
        starts = torch.tensor([0, *(len(choice.options) for choice in choices)]).cumsum(0).tolist()
        right = sum(
            log_likelihood[start : start + len(choice.options)].argmax().item() == choice.answer
            for start, choice in zip(starts, choices, strict=False)
        )
        scores["accuracy"] = right / len(choices)
    return scores


def batches_of(rows: Sequence[Example], batch_size: int) -> list[list[int]]:
    """The indices of ``rows``, a batch at a time, alike lengths together so that little is padding."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    return [order[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def primary_metric(scores: Scores) -> str:
    """What "best" looks at: accuracy where there is one, else loss."""
    return "accuracy" if "accuracy" in scores else "loss"


def better(scores: Scores, than: Scores) -> bool:
    """Whether ``scores`` are strictly better by the primary metric."""
    metric = primary_metric(scores)
    return scores[metric] > than[metric] if metric == "accuracy" else scores[metric] < than[metric]


def mean_scores(peers: Mapping[str, Scores]) -> Scores:
    """The mean over peers of each score."""
    names = next(iter(peers.values()))
    return {name: sum(scores[name] for scores in peers.values()) / len(peers) for name in names}


def _reduce(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's summed loss (N,), and its most likely class (N,) where there are classes; on the CPU."""
    losses = summed_loss(logits, labels, len(labels)).cpu()
    return losses, logits.argmax(dim=-1).cpu() if logits.dim() == 2 else losses


def _classification(predicted: Tensor, labels: Tensor, num_classes: int) -> Scores:
    """Accuracy and F1 from the confusion counts."""
    f1 = []
    for label in range(num_classes):
        hits = ((predicted == label) & (labels == label)).sum().item()
        named = (predicted == label).sum().item() + (labels == label).sum().item()
        f1.append(2 * hits / named if named else 0.0)
    return {
        "accuracy": (predicted == labels).double().mean().item(),
        "f1": f1[1] if num_classes == 2 else sum(f1) / num_classes,
    }
