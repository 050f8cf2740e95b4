"""Scores adapters: those of single peers, the average adapter, and the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dlora.config.tasks import score_of
from dlora.data.batches import collate
from dlora.data.formats import Choice, Example
from dlora.lora.stacked import StackedModel
from dlora.tasks.generation import Asked, Writing, compared, written
from dlora.tasks.losses import num_targets, summed_loss
from dlora.tasks.scores import Scored, Scores, predictions, scored
from dlora.train import autocast, forward

_Batch = tuple[Tensor, Tensor, list[int]]
T = TypeVar("T")


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
    gathered: Callable[[list[Any]], list[list[Any]]] = lambda own: [own],
    writing: Writing | None = None,
) -> list[Scored]:
    """Score the P participants of ``factors`` ((P, ...) each) on ``examples``, all P together.

    Returns one `Scored` for each participant: the mean loss over the targets, and the scores of
    `tasks.scores.scored`. A language model has loss and perplexity; with ``choices`` also accuracy,
    where the most likely option is the answer, and with ``writing`` the scores of what it writes.
    ``batch_size``: examples of one participant in a forward pass, which has P times as many rows.
    ``on_batch(done, total)`` is called with numbers of examples, before the first batch and after
    each. ``killed``: numbers of the units that are not trained, as for `StackedModel.use`.
    ``ranks``: how many processes score these participants, each a part of the batches; this one is
    number ``rank``. ``gathered`` returns what each of them found, in their order.
    """
    model.network.eval()
    num_participants = len(next(iter(factors.values())))
    options = [option for choice in choices for option in choice.options]
    total = len(examples) + len(options) + (len(writing.asked) if writing else 0)
    on_batch(0, total)

    def dealt(
        rows: Sequence[Example | Asked], already: int, of_one: Callable[[list[int]], T]
    ) -> list[T]:
        """What ``of_one`` finds for each batch of these rows, which it gets as their indices."""
        model.use(factors, killed)
        done, batches, own = already, batches_of(rows, batch_size), list[T]()
        for chosen in batches[rank::ranks]:
            own.append(of_one(chosen))
            done += len(chosen)
            on_batch(done, total)
        of_each = gathered(own)
        return [of_each[number % ranks][number // ranks] for number in range(len(batches))]

    def passed(rows: Sequence[Example], already: int) -> list[_Batch]:
        """For each batch of N rows: losses (P, N), predictions (P, N, ...), N indices of rows."""

        def of_one(chosen: list[int]) -> _Batch:
            batch = collate([rows[index] for index in chosen] * num_participants, pad_token_id).to(
                model.device
            )
            with autocast(model.device, autocast_dtype):
                logits = forward(model, batch)
            losses = summed_loss(model.task, logits, batch.labels, len(batch.labels)).cpu()
            # of a language model, whose logits are many, the losses are enough
            guessed = predictions(model.task, logits).cpu() if model.task.has_head else losses
            return (
                losses.view(num_participants, -1),
                guessed.view(num_participants, len(chosen), *guessed.shape[1:]),
                chosen,
            )

        return dealt(rows, already, of_one)

    found = passed(examples, 0)
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
        for of, _, chosen in passed(options, len(examples)):
            log_likelihood[:, chosen] = -of
        starts = torch.tensor([0, *(len(choice.options) for choice in choices)]).cumsum(0).tolist()
        for participant, own in enumerate(log_likelihood):
            right = sum(
                own[start : start + len(choice.options)].argmax().item() == choice.answer
                for start, choice in zip(starts, choices, strict=False)
            )
            scores[participant]["accuracy"] = right / len(choices)
    if writing is not None:

        def write(chosen: list[int]) -> tuple[list[int], list[list[str]]]:
            with autocast(model.device, autocast_dtype):
                return chosen, written(model, writing, chosen, num_participants)

        texts = [[""] * len(writing.asked) for _ in range(num_participants)]
        for chosen, of_these in dealt(writing.asked, len(examples) + len(options), write):
            for participant, own_texts in enumerate(of_these):
                for index, text in zip(chosen, own_texts, strict=True):
                    texts[participant][index] = text
        for participant, own_texts in enumerate(texts):
            scores[participant] |= compared(writing, own_texts)
    return [Scored(each) for each in scores]


def batches_of(rows: Sequence[Example | Asked], batch_size: int) -> list[list[int]]:
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
