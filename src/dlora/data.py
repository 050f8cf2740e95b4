"""Whose examples: format, tokenise, batch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlora.config import DataSection
from dlora.errors import ConfigError, DataError
from dlora.partition import by_owner, partition
from dlora.rows import PlacedRow, Row, as_text, read_placed
from dlora.seeds import derive_seed

IGNORED = -100  # the label that torch's cross entropy skips

# The forms of causal-lm by their columns, in the order in which they are looked for.
_FORMS: dict[tuple[str, ...], str] = {
    ("messages",): "messages",
    ("prompt", "completion"): "prompt + completion",
    ("prompt", "options", "answer"): "prompt + options + answer",
    ("instruction", "output"): "instruction + output (input, answer optional)",
    ("instruction", "response"): "instruction + response (context optional)",
    ("text",): "text",
}


@dataclass(frozen=True)
class Example:
    """One tokenised row; labels: the class index, or one id a token with -100 where the loss does not look."""

    input_ids: list[int]
    labels: int | list[int]
    token_type_ids: list[int] | None = None


@dataclass(frozen=True)
class Choice:
    """A question with options: right when the answer is the likeliest continuation."""

    options: tuple[Example, ...]
    answer: int


@dataclass(frozen=True)
class FederatedData:
    """Everyone's examples: peer -> what it trains on, and what all are scored on.

    choices is for causal-lm with options, else empty; label_names and label_counts (peer -> label name -> rows) are
    for classification, else None.
    """

    peers: dict[str, list[Example]]
    evaluation: list[Example]
    choices: list[Choice]
    label_names: tuple[str, ...] | None
    label_counts: dict[str, dict[str, int]] | None


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right: ids, mask, type ids (examples, tokens) int64; labels alike, or (examples,)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_type_ids: Tensor | None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        tensors = {key: value.to(device) for key, value in vars(self).items() if value is not None}
        return replace(self, **tensors)


def load_data(section: DataSection, task: str, num_peers: int | None, tokenizer: Any, seed: int) -> FederatedData:
    """Read, check, divide and tokenise. A pure function of the files, the arguments and the tokenizer.

    Raises DataError or ConfigError: what is wrong, in which file, column or row, and what to do.
    """
    owner = [section.partition.column] if section.partition.column else []
    train = read_placed(section.train, section.columns, _required(section, task) + owner)
    names = _label_names(section, train) if task == "classification" else None
    train = _draw(train, section.limit, seed, "train")
    labels = _label_indices(section, train, names) if names else None
    if names and labels and len(set(labels)) == 1:
        only = f"every training row has the label {names[labels[0]]!r}"
        raise DataError(f"{only}; a classifier needs at least two: bring other rows, or raise data.limit")

    if section.partition.kind == "files":
        hands = by_owner([placed.owner for placed in train], section.train, num_peers)
    else:
        rows = [placed.row for placed in train]
        hands = partition(section.partition, num_peers, labels, len(names) if names else None, rows, seed)
    counts = None
    if labels and names:
        held = {peer: Counter(labels[index] for index in hand) for peer, hand in hands.items()}
        counts = {peer: {name: own[label] for label, name in enumerate(names)} for peer, own in held.items()}
    peers = {peer: _encode(section, tokenizer, [train[i] for i in hand], names)[0] for peer, hand in hands.items()}
    evaluation, choices = encode_evaluation(section, task, tokenizer, names, seed)
    return FederatedData(peers, evaluation, choices, names, counts)


def encode_evaluation(
    section: DataSection, task: str, tokenizer: Any, label_names: Sequence[str] | None, seed: int
) -> tuple[list[Example], list[Choice]]:
    """The examples of `section.eval`, and its choices where rows have options (causal-lm).

    `label_names` are those of training (classification, else None): a label that is not among them is a DataError.
    Every other mistake in the file is one too.
    """
    placed = read_placed(section.eval, section.columns, _required(section, task))
    placed = _draw(placed, section.eval_limit, seed, "eval")
    return _encode(section, tokenizer, placed, label_names, with_choices=True)


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad to the longest on the right: ids with `pad_token_id`, label lists with -100, type ids with 0."""
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: Sequence[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], dtype=torch.int64)

    ids = [example.input_ids for example in examples]
    classes = [example.labels for example in examples if isinstance(example.labels, int)]
    tokens = [example.labels for example in examples if isinstance(example.labels, list)]
    labels = torch.tensor(classes, dtype=torch.int64) if classes else padded(tokens, IGNORED)
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    mask = padded([[1] * len(row) for row in ids], 0)
    return Batch(padded(ids, pad_token_id), mask, labels, padded(types, 0) if types else None)


class BatchStream:
    """One peer's endless order of examples: a permutation a pass, a pure function of (seed, name, position)."""

    def __init__(self, num_examples: int, seed: int, name: str) -> None:
        """The order of `num_examples` (at least 1) for the peer called `name`."""
        assert num_examples > 0
        self.num_examples, self.seed, self.name = num_examples, seed, name
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)  # a cache only

    def take(self, start: int, count: int) -> list[int]:
        """The indices at positions start .. start + count - 1; every pass holds each index once."""
        taken: list[int] = []
        while len(taken) < count:
            which, offset = divmod(start + len(taken), self.num_examples)
            if which != self._pass:
                generator = np.random.default_rng(derive_seed(self.seed, "order", self.name, which))
                self._pass, self._order = which, generator.permutation(self.num_examples)
            taken += self._order[offset : offset + count - len(taken)].tolist()
        return taken


def _draw(placed: list[PlacedRow], limit: int | None, seed: int, purpose: str) -> list[PlacedRow]:
    """At most `limit` rows, without replacement, in their order."""
    if limit is None or limit >= len(placed):
        return placed
    generator = np.random.default_rng(derive_seed(seed, "limit", purpose))
    return [placed[index] for index in sorted(generator.choice(len(placed), limit, replace=False).tolist())]


def _required(section: DataSection, task: str) -> list[str]:
    texts = (section.text,) if isinstance(section.text, str) else section.text
    return [*texts, section.label] if task == "classification" else []


def _label_name(value: Any, column: str, place: str) -> str:
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"{place}: {column} is {value}; expected the name or number of a class")
        value = int(value)
    return as_text(value, column, place)


def _label_names(section: DataSection, train: list[PlacedRow]) -> tuple[str, ...]:
    if section.labels is not None:
        twice = sorted({name for name in section.labels if section.labels.count(name) > 1})
        if twice:
            raise ConfigError(f"data.labels names {twice[0]!r} twice; name each label once")
        return section.labels
    names = {_label_name(placed.row[section.label], section.label, placed.place) for placed in train}
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _label_indices(section: DataSection, placed: list[PlacedRow], names: Sequence[str]) -> list[int]:
    index = {name: number for number, name in enumerate(names)}
    labels = []
    for row, _, place, _ in placed:
        name = _label_name(row[section.label], section.label, place)
        if name not in index:
            raise DataError(
                f"{place}: the label {name!r} is not among those of training or data.labels: {', '.join(names)}; "
                "mend the row or name it there"
            )
        labels.append(index[name])
    return labels


def _encode(
    section: DataSection,
    tokenizer: Any,
    placed: list[PlacedRow],
    names: Sequence[str] | None,
    with_choices: bool = False,
) -> tuple[list[Example], list[Choice]]:
    if names is None:
        return _encode_causal(placed, tokenizer, section.max_length, with_choices)
    columns = _required(section, "classification")[:-1]
    specials = tokenizer.num_special_tokens_to_add(pair=len(columns) == 2)
    if section.max_length <= specials:
        raise ConfigError(f"data.max_length {section.max_length}: the tokenizer adds {specials} tokens; make it larger")
    texts = [[as_text(row[column], column, place) for row, _, place, _ in placed] for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=section.max_length)
    types = encoded.get("token_type_ids") or [None] * len(placed)
    labels = _label_indices(section, placed, names)
    return [Example(*fields) for fields in zip(encoded["input_ids"], labels, types, strict=True)], []


class _Question(NamedTuple):
    """A prompt and its possible answers; training sees the one at `gold`."""

    prompt: str
    answers: tuple[str, ...]
    gold: int


def _encode_causal(
    placed: list[PlacedRow], tokenizer: Any, max_length: int, with_choices: bool
) -> tuple[list[Example], list[Choice]]:
    kinds = list(dict.fromkeys(row.columns for row in placed))
    if len(kinds) > 1:  # several files, each in its own form
        groups = [[row for row in placed if row.columns == kind] for kind in kinds]
        parts = [_encode_causal(group, tokenizer, max_length, with_choices) for group in groups]
        return [example for part in parts for example in part[0]], [choice for part in parts for choice in part[1]]
    form = next((form for form in _FORMS if set(form) <= set(kinds[0])), None)
    if form is None:
        source = placed[0].place.rpartition(" row ")[0]
        raise DataError(f"{source} has the columns {', '.join(kinds[0])}; causal-lm knows {'; '.join(_FORMS.values())}")
    if form == ("messages",):
        return [_conversation(row.get("messages"), place, tokenizer, max_length) for row, _, place, _ in placed], []
    if form == ("text",):
        texts = [as_text(row.get("text"), "text", place) for row, _, place, _ in placed]
        return _running_text(texts, [row.place for row in placed], tokenizer, max_length), []

    questions = [_question(form, row, place, tokenizer.eos_token_id is not None) for row, _, place, _ in placed]
    if not with_choices:
        questions = [_Question(prompt, (answers[gold],), 0) for prompt, answers, gold in questions]
    prompts = _ids(tokenizer, [question.prompt for question in questions])
    wholes = iter(_ids(tokenizer, [prompt + answer for prompt, answers, _ in questions for answer in answers]))
    examples, choices = [], []
    for question, prompt in zip(questions, prompts, strict=True):
        options = tuple(_answered(prompt, next(wholes), tokenizer, max_length) for _ in question.answers)
        examples.append(options[question.gold])
        if len(options) > 1:
            choices.append(Choice(options, question.gold))
    return examples, choices


def _question(form: tuple[str, ...], row: Row, place: str, has_eos: bool) -> _Question:
    if "prompt" in form:
        prompt = as_text(row.get("prompt"), "prompt", place)
        if "completion" in form:
            return _Question(prompt, (_answer(row.get("completion"), "completion", place, has_eos),), 0)
        options, answer = row.get("options"), row.get("answer")
        if not isinstance(options, list) or len(options) < 2 or len(set(map(str, options))) < len(options):
            raise DataError(f"{place}: options is {options!r}; expected a list of at least two different answers")
        texts = tuple(as_text(option, "options", place) for option in options)
        if answer in options or answer in texts:
            return _Question(prompt, texts, options.index(answer) if answer in options else texts.index(answer))
        if isinstance(answer, int) and 0 <= answer < len(texts):
            return _Question(prompt, texts, answer)
        raise DataError(f"{place}: answer {answer!r} is no option, and no index from 0 to {len(texts) - 1}")

    instruction = as_text(row.get("instruction"), "instruction", place)
    extra = "input" if "output" in form else "context"
    context = "" if row.get(extra) in (None, "") else as_text(row[extra], extra, place)
    prompt = _alpaca_prompt(instruction, context)
    output = _answer(row.get(form[1]), form[1], place, has_eos)
    listed = re.search(r"Answer format:\s*(\S+)\s*\Z", instruction)  # LLM-Adapters' commonsense sets
    if not listed or "/" not in listed[1] or row.get("answer") is None:
        return _Question(prompt, (output,), 0)
    names, answer = listed[1].split("/"), str(row["answer"])
    if answer not in names or answer not in output:
        raise DataError(f"{place}: answer {answer!r} must be one of {', '.join(names)} and occur in output {output!r}")
    before, _, after = output.rpartition(answer)
    return _Question(prompt, tuple(before + name + after for name in names), names.index(answer))


def _alpaca_prompt(instruction: str, context: str) -> str:
    """Stanford Alpaca's (tatsu-lab/stanford_alpaca, train.py), with LLM-Adapters' newline before the response."""
    paired = ", paired with an input that provides further context" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{context}\n\n" if context else "") + "### Response:\n"
    )


def _answer(value: Any, column: str, place: str, has_eos: bool) -> str:
    # An empty answer is a lesson too (Alpaca has some): the end-of-sequence token alone.
    return "" if value == "" and has_eos else as_text(value, column, place)


def _ids(tokenizer: Any, texts: list[str], special: bool = True) -> list[list[int]]:
    # verbose: no warning about texts longer than the model takes; they are cut here
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _common(left: list[int], right: list[int]) -> int:
    """How many leading tokens are the same."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _answered(prompt: list[int], whole: list[int], tokenizer: Any, max_length: int) -> Example:
    """Loss from the first token that differs from the prompt's own: one that joins both holds a piece of the answer."""
    start = _common(prompt, whole)
    eos = tokenizer.eos_token_id
    ids = whole if eos is None or whole[-1:] == [eos] and len(whole) > start else [*whole, eos]
    return _cut(ids, [False] * start + [True] * (len(ids) - start), tokenizer, max_length)


def _cut(ids: list[int], learn: list[bool], tokenizer: Any, max_length: int) -> Example:
    """The last answer stays: what comes before it is cut on the left, and only then the answer at its end."""
    if len(ids) > max_length:
        end = len(learn) - learn[::-1].index(True)
        start = end
        while start > 0 and learn[start - 1]:
            start -= 1
        kept = 1 if ids[0] == tokenizer.bos_token_id else 0  # models expect their first token
        room = max_length - kept
        begin = max(kept, min(end - room, start - 1 + kept))  # one token must stand before the answer's first
        ids = ids[:kept] + ids[begin : begin + room]
        learn = learn[:kept] + learn[begin : begin + room]
    return Example(ids, [token if counts else IGNORED for token, counts in zip(ids, learn, strict=True)])


def _running_text(texts: list[str], places: list[str], tokenizer: Any, max_length: int) -> list[Example]:
    examples, eos = [], tokenizer.eos_token_id
    for place, ids in zip(places, _ids(tokenizer, texts), strict=True):
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        if len(ids) < 2:
            raise DataError(f"{place}: the text is a single token, nothing to predict from it; remove the row")
        pieces = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
        examples += [Example(piece, list(piece)) for piece in pieces if len(piece) > 1]
    return examples


def _conversation(messages: Any, place: str, tokenizer: Any, max_length: int) -> Example:
    """One chat as the tokenizer's template writes it, loss on the assistant's turns only."""
    template = tokenizer.chat_template
    if not template:
        raise DataError(f"{place}: messages need a chat template, the tokenizer has none; take prompt + completion")
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        raise DataError(f"{place}: messages must be a list of {{role, content}}, both text")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError(f"{place}: messages has no turn of the assistant, so nothing to learn; remove the row")
    try:
        if re.search(r"\{%-?\s*generation\b", str(template)):
            marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            ids, learn = list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
        else:
            ids, learn = _by_prefixes(messages, tokenizer)
    except Exception as error:  # a template raises what it likes
        raise DataError(f"{place}: the chat template refuses these messages: {' '.join(str(error).split())}") from error
    if not any(learn):
        raise DataError(f"{place}: the chat template marks no token as the assistant's; remove the row")
    return _cut(ids, learn, tokenizer, max_length)


def _by_prefixes(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Each answer is what the conversation with it has more than the conversation before it."""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = _ids(tokenizer, [whole], special=False)[0]
    learn = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        earlier = messages[:turn]  # a template takes at least one turn
        before = tokenizer.apply_chat_template(earlier, tokenize=False, add_generation_prompt=True) if earlier else ""
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (whole.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"it rewrites earlier turns, so turn {turn + 1} cannot be told apart; take one answer a row"
            )
        start, end = (_common(prefix, ids) for prefix in _ids(tokenizer, [before, after], special=False))
        learn[start:end] = [True] * (end - start)
    return ids, learn
