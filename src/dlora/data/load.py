"""A run's examples: read, labelled, tokenised, divided among peers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dlora.config.tasks import TASKS, Task
from dlora.config.training import DataSection
from dlora.data.checks import cut_counts, leaks, seen_share
from dlora.data.first_look import own_section
from dlora.data.formats import Choice, Example, encode_causal, ends_by_token
from dlora.data.labels import doubts, label_indices, label_names, leave_out
from dlora.data.partition import by_owner, partition
from dlora.data.rows import PlacedRow, read_placed
from dlora.data.texts import encode_texts, encode_words
from dlora.errors import ConfigError, DataError
from dlora.seeds import derive_seed


@dataclass(frozen=True)
class FederatedData:
    """Everyone's examples: peer -> what it trains on, and what all are scored on.

    choices is for causal-lm with options, else empty; label_names are for tasks whose labels have
    names, label_counts (peer -> label name -> rows) for classification, else None. facts is what
    the log says of the data: rows that were cut or left out, the share of evaluation rows in
    training; warnings are sentences for the user.
    """

    peers: dict[str, list[Example]]
    evaluation: list[Example]
    choices: list[Choice]
    label_names: tuple[str, ...] | None
    label_counts: dict[str, dict[str, int]] | None
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def load_data(
    section: DataSection, task: str, peers: int | Sequence[str] | None, tokenizer: Any, seed: int
) -> FederatedData:
    """Read, check, divide among ``peers`` (how many, or their names) and tokenise. A pure function
    of files and arguments.

    Raises DataError or ConfigError: what is wrong, in which file, column or row, and what to do.
    """
    members = None if peers is None or isinstance(peers, int) else tuple(peers)
    num_peers = peers if peers is None or isinstance(peers, int) else len(peers)
    owner = [section.partition.column] if section.partition.column else []
    train, names, said = _read_training(section, task, owner)
    train = draw_rows(train, section.limit, seed, "train")
    labels = _classes(section, TASKS[task], train, names)
    if names and labels and len(set(labels)) == 1:
        only = f"every training row has the label {names[labels[0]]!r}"
        raise DataError(
            f"{only}; a classifier needs at least two: bring other rows, or raise data.limit"
        )

    if section.partition.kind == "files":
        hands = by_owner([placed.owner for placed in train], section.train, num_peers)
    else:
        rows = [placed.row for placed in train]
        hands = partition(
            section.partition, num_peers, labels, len(names) if names else None, rows, seed
        )
    if members is not None:
        if section.partition.kind != "files":
            hands = dict(zip(members, hands.values(), strict=True))
        elif set(hands) != set(members):
            odd = ", ".join(sorted(set(hands) ^ set(members)))
            raise ConfigError(
                "data.train and peers.members must name the same peers; only one of them names"
                f" {odd}"
            )
        hands = {name: hands[name] for name in members}
    return _federated(section, task, tokenizer, seed, train, hands, labels, names, said)


def load_own_data(
    section: DataSection, task: str, name: str, tokenizer: Any, seed: int, alone: bool = False
) -> FederatedData:
    """The rows of one real participant: all of ``data.train``, or its own file where that names one
    for each.

    Raises as `load_data` and `own_section`.
    """
    section = own_section(section, task, name, alone)
    train, names, said = _read_training(section, task, [])
    train = draw_rows(train, section.limit, seed, "train")
    labels = _classes(section, TASKS[task], train, names)
    return _federated(
        section, task, tokenizer, seed, train, {name: list(range(len(train)))}, labels, names, said
    )


def _read_training(
    section: DataSection, task: str, owner: list[str]
) -> tuple[list[PlacedRow], tuple[str, ...] | None, list[str]]:
    """The training rows (with a label, where the task needs one), the classes, and what is odd
    about them.
    """
    train = read_placed(section.train, section.columns, _required(section, task) + owner)
    if not TASKS[task].has_head:
        return train, None, []
    kept = leave_out(section, train)
    names = label_names(section, TASKS[task], kept) if TASKS[task].names_labels else None
    said = (
        []
        if len(kept) == len(train)
        else [_left_out(section, len(train) - len(kept), len(train), "training")]
    )
    if names and TASKS[task].label == "class":
        said += doubts(section, kept, names)
    return kept, names, said


def _classes(
    section: DataSection, task: Task, train: list[PlacedRow], names: Sequence[str] | None
) -> list[int] | None:
    """The class of each row, by which rows can be divided; None where a row has not one class."""
    if task.label != "class" or names is None:
        return None
    return [index for [index] in label_indices(section, task, train, names)]


def _left_out(section: DataSection, count: int, total: int, what: str) -> str:
    return f"{count:,} of {total:,} {what} rows have no label and are left out (data.no_label)"


def _federated(
    section: DataSection,
    task: str,
    tokenizer: Any,
    seed: int,
    train: list[PlacedRow],
    hands: dict[str, list[int]],
    labels: list[int] | None,
    names: tuple[str, ...] | None,
    said: list[str],
) -> FederatedData:
    counts = None
    if labels and names:
        held = {peer: Counter(labels[index] for index in hand) for peer, hand in hands.items()}
        counts = {
            peer: {name: own[label] for label, name in enumerate(names)}
            for peer, own in held.items()
        }
    peers = {
        peer: _encode(section, TASKS[task], tokenizer, [train[i] for i in hand], names)[0]
        for peer, hand in hands.items()
    }
    evaluation, choices = encode_evaluation(section, task, tokenizer, names, seed)
    trained = [example for hand in peers.values() for example in hand]
    seen = seen_share(trained, evaluation)
    facts: dict[str, Any] = {
        "train": cut_counts(trained),
        "eval": cut_counts(evaluation),
        "eval_in_train": seen,
    }
    said = said + leaks(section, seen)
    if TASKS[task].label == "text":
        facts["end_token"] = tokenizer.eos_token
        if tokenizer.eos_token_id is None and any(ends_by_token(row) for row in train):
            said.append(
                "the tokenizer has no end token, so no example ends with one and the model does not"
                " learn to stop"
            )
    return FederatedData(peers, evaluation, choices, names, counts, facts, tuple(said))


def encode_evaluation(
    section: DataSection, task: str, tokenizer: Any, label_names: Sequence[str] | None, seed: int
) -> tuple[list[Example], list[Choice]]:
    """The examples of `section.eval`, and its choices where rows have options (causal-lm).

    `label_names` are those of training, or None where labels have no names: a label that is not
    among them is a DataError. Every other mistake in the file is one too.
    """
    placed = read_placed(section.eval, section.columns, _required(section, task))
    placed = leave_out(section, placed) if TASKS[task].has_head else placed
    placed = draw_rows(placed, section.eval_limit, seed, "eval")
    return _encode(section, TASKS[task], tokenizer, placed, label_names, with_choices=True)


def draw_rows(
    placed: list[PlacedRow], limit: int | None, seed: int, purpose: str
) -> list[PlacedRow]:
    """At most `limit` rows, without replacement, in their order; ``purpose``: train or eval, which
    draw apart.
    """
    if limit is None or limit >= len(placed):
        return placed
    generator = np.random.default_rng(derive_seed(seed, "limit", purpose))
    return [
        placed[index]
        for index in sorted(generator.choice(len(placed), limit, replace=False).tolist())
    ]


def _required(section: DataSection, task: str) -> list[str]:
    texts = (section.text,) if isinstance(section.text, str) else section.text
    # else a row without one is left out
    label = [section.label] if section.no_label is None else []
    return [*texts, *label] if TASKS[task].has_head else []


def _encode(
    section: DataSection,
    task: Task,
    tokenizer: Any,
    placed: list[PlacedRow],
    names: Sequence[str] | None,
    with_choices: bool = False,
) -> tuple[list[Example], list[Choice]]:
    if task.label == "text":
        return encode_causal(placed, tokenizer, section, with_choices)
    if task.label == "words":
        assert names is not None
        return encode_words(section, task, tokenizer, placed, names), []
    return encode_texts(section, task, tokenizer, placed, names), []
