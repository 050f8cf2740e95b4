"""Scores adapters: those of single peers, the average adapter, and the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dlora.config.tasks import score_of
from dlora.data.batches import collate
from dlora.data.formats import Choice, Example
from dlora.lora.stacked import StackedModel
from dlora.tasks.losses import num_targets, summed_loss
from dlora.tasks.scores import Scored, Scores, predictions, scored
from dlora.train import autocast, forward

_Batch = tuple[Tensor, Tensor, list[int]]


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
            losses = summed_loss(model.task, logits, batch.labels, len(batch.labels)).cpu()
            # of a language model, whose logits are many, the losses are enough
            guessed = predictions(model.task, logits).cpu() if model.task.has_head else losses
            found.append(
                (
                    losses.view(num_participants, -1),
                    guessed.view(num_participants, len(chosen), *guessed.shape[1:]),
                    chosen,
                )
            )
            done += len(chosen)
            on_batch(done, total)
        of_each = gathered(found)
        return [of_each[number % ranks][number // ranks] for number in range(len(dealt))]

    found = batches(examples, 0)
    targets = sum(
        num_targets(model.task, torch.tensor([example.labels]), 1).item() for example in examples
    )
    targets = max(1, targets)
    losses = [
        sum(of[participant].sum().item() for of, _, _ in found) / targets
        for participant in range(num_participants)
    ]
    if model.task.has_head:
        predicted, names = _joined(found, len(examples)), model.network.config.id2label
        names = [names[number] for number in range(len(names))]
        of_each = [scored(model.task, own, examples, names) for own in predicted]
        return [
            replace(one, scores=one.scores | {"loss": loss})
            for one, loss in zip(of_each, losses, strict=True)
        ]
    scores = [{"loss": loss, "perplexity": math.exp(min(loss, 700.0))} for loss in losses]
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


def better(scores: Scores, than: Scores, metric: str) -> bool:
    """Whether ``scores`` are strictly better by the score ``metric``."""
    higher = score_of(metric).higher_is_better
    return scores[metric] > than[metric] if higher else scores[metric] < than[metric]


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


def _joined(found: Sequence[_Batch], num_examples: int) -> Tensor:
    """The predictions of all batches, (P, examples, ...), in the order of the examples."""
    first = found[0][1]
    # of tokens, each batch has as many as its longest row
    widest = [max(sizes) for sizes in zip(*(one.shape[2:] for _, one, _ in found), strict=True)]
    joined = first.new_zeros(len(first), num_examples, *widest)
    for _, guessed, chosen in found:
        place: tuple[Any, ...] = (slice(None), chosen, *map(slice, guessed.shape[2:]))
        joined[place] = guessed
    return joined
