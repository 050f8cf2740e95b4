"""Causal-lm rows by their columns: prompts, chats, choices, plain text, and where the loss
looks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dlora.config.training import DataSection
from dlora.data.chats import encode_chat, from_sharegpt
from dlora.data.rows import PlacedRow, Row, as_text
from dlora.errors import DataError

IGNORED = -100  # the label that torch's cross entropy skips

# The forms of causal-lm by their columns, in the order in which they are looked for.
_FORMS: dict[tuple[str, ...], str] = {
    ("messages",): "messages",
    ("prompt", "completion"): "prompt + completion",
    ("prompt", "options", "answer"): "prompt + options + answer",
    ("instruction", "output"): "instruction + output (input, answer optional)",
    ("instruction", "response"): "instruction + response (context optional)",
    ("conversations",): "conversations",
    ("text",): "text",
}
# Columns of data sets that people have and dlora has no task for -> what to say.
_OTHERS = {
    (
        "chosen",
        "rejected",
    ): (
        "these are preference rows (DPO, reward models), for which dlora has no task: keep the"
        " chosen answers, as prompt + completion or as messages"
    ),
    (
        "completions",
        "labels",
    ): "these are rows of stepwise supervision, for which dlora has no task",
    ("tokens",): "a label for each word (NER, tagging) wants task: token-classification",
    (
        "question",
        "context",
        "answers",
    ): "these are rows of extractive question answering: write prompt + completion",
}


@dataclass(frozen=True)
class Example:
    """One tokenised row; labels: the class index, a number, a 0.0 or 1.0 for each class, or one id
    a token with -100 where the loss does not look.

    num_cut: tokens that max_length took; num_learned_cut: those of them that would have been
    learned.
    """

    input_ids: list[int]
    labels: int | float | tuple[float, ...] | list[int]
    token_type_ids: list[int] | None = None
    num_cut: int = 0
    num_learned_cut: int = 0


def rows_hash(rows: Sequence[Example]) -> str:
    """SHA-256 (hex) of the tokens and labels of these rows, in their order."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(repr((row.input_ids, row.labels)).encode())
    return sha.hexdigest()


@dataclass(frozen=True)
class Choice:
    """A question with options: right when the answer is the likeliest continuation."""

    options: tuple[Example, ...]
    answer: int


class _Question(NamedTuple):
    """A prompt and its possible answers; training sees the one at `gold`."""

    prompt: str
    answers: tuple[str, ...]
    gold: int


def encode_causal(
    placed: list[PlacedRow], tokenizer: Any, section: DataSection, with_choices: bool
) -> tuple[list[Example], list[Choice]]:
    """Rows (at least one) as examples, in the form that their columns say, and as choices where
    rows have options. Without `with_choices` only the right option is tokenised. Raises DataError
    for unknown columns, or naming the row that is wrong and what to do.
    """
    kinds = list(dict.fromkeys((row.columns, _is_chat(row)) for row in placed))
    if len(kinds) > 1:  # several files, each in its own form
        groups = [[row for row in placed if (row.columns, _is_chat(row)) == kind] for kind in kinds]
        parts = [encode_causal(group, tokenizer, section, with_choices) for group in groups]
        return [example for part in parts for example in part[0]], [
            choice for part in parts for choice in part[1]
        ]
    form, max_length = form_of(placed[0]), section.max_length
    if kinds[0][1]:
        return [_conversation(row, tokenizer, section) for row in placed], []
    if form == ("text",):
        texts = [as_text(row.get("text"), "text", place) for row, _, place, _ in placed]
        return _running_text(texts, [row.place for row in placed], tokenizer, max_length), []
    if form == ("prompt", "completion") and all(
        isinstance(row.row.get("label"), bool) for row in placed
    ):
        raise DataError(
            f"{placed[0].place}: label says whether the completion is wanted (KTO), for which dlora"
            " has no task: keep the wanted ones, and leave out the column label"
        )

    questions = [
        _question(form, row, place, tokenizer.eos_token_id is not None)
        for row, _, place, _ in placed
    ]
    if not with_choices:
        questions = [_Question(prompt, (answers[gold],), 0) for prompt, answers, gold in questions]
    prompts = _ids(tokenizer, [question.prompt for question in questions])
    wholes = iter(
        _ids(tokenizer, [prompt + answer for prompt, answers, _ in questions for answer in answers])
    )
    examples, choices = [], []
    for question, prompt in zip(questions, prompts, strict=True):
        options = tuple(
            _answered(prompt, next(wholes), tokenizer, max_length) for _ in question.answers
        )
        examples.append(options[question.gold])
        if len(options) > 1:
            choices.append(Choice(options, question.gold))
    return examples, choices


def form_of(placed: PlacedRow) -> tuple[str, ...]:
    """The columns by which a row's form is known. Raises DataError where causal-lm knows none of
    them.
    """
    form = next((form for form in _FORMS if set(form) <= set(placed.columns)), None)
    if form is None:
        source, columns = placed.place.rpartition(" row ")[0], ", ".join(placed.columns)
        other = next(
            (f"{said}; " for known, said in _OTHERS.items() if set(known) <= set(placed.columns)),
            "",
        )
        raise DataError(
            f"{source} has the columns {columns}; {other}causal-lm knows"
            f" {'; '.join(_FORMS.values())}"
        )
    return form


def ends_by_token(placed: PlacedRow) -> bool:
    """Whether the end of this row is taught by the tokenizer's end token; a chat template writes
    its own.
    """
    return not _is_chat(placed)


def _is_chat(placed: PlacedRow) -> bool:
    form = form_of(placed)
    return (
        form[0] in ("messages", "conversations")
        or form[0] == "prompt"
        and isinstance(placed.row.get("prompt"), list)
    )


def _conversation(placed: PlacedRow, tokenizer: Any, section: DataSection) -> Example:
    """One chat, with the loss on the answers only. For prompt + completion as lists of messages,
    the loss is on the answers of the completion.
    """
    row, _, place, _ = placed
    form, first = form_of(placed)[0], 0
    turns: Any
    if form == "prompt":
        prompt, completion = row["prompt"], row.get("completion")
        if not isinstance(completion, list):
            raise DataError(f"{place}: prompt is a list of messages, so completion must be one too")
        turns, first = [*prompt, *completion], len(prompt)
    else:
        turns = row.get(form) if form == "messages" else from_sharegpt(row.get(form), place)
    ids, learn = encode_chat(turns, place, tokenizer, row.get("tools"), section.fold_system, first)
    return _cut(ids, learn, tokenizer, section.max_length)


def _question(form: tuple[str, ...], row: Row, place: str, has_eos: bool) -> _Question:
    if "prompt" in form:
        prompt = as_text(row.get("prompt"), "prompt", place)
        if "completion" in form:
            return _Question(
                prompt, (_answer(row.get("completion"), "completion", place, has_eos),), 0
            )
        options, answer = row.get("options"), row.get("answer")
        if (
            not isinstance(options, list)
            or len(options) < 2
            or len(set(map(str, options))) < len(options)
        ):
            raise DataError(
                f"{place}: options is {options!r}; expected a list of at least two different"
                " answers"
            )
        texts = tuple(as_text(option, "options", place) for option in options)
        if answer in options or answer in texts:
            return _Question(
                prompt, texts, options.index(answer) if answer in options else texts.index(answer)
            )
        if isinstance(answer, int) and 0 <= answer < len(texts):
            return _Question(prompt, texts, answer)
        raise DataError(
            f"{place}: answer {answer!r} is no option, and no index from 0 to {len(texts) - 1}"
        )

    instruction = as_text(row.get("instruction"), "instruction", place)
    extra = "input" if "output" in form else "context"
    context = "" if row.get(extra) in (None, "") else as_text(row[extra], extra, place)
    prompt = _alpaca_prompt(instruction, context)
    output = _answer(row.get(form[1]), form[1], place, has_eos)
    # LLM-Adapters' commonsense sets
    listed = re.search(r"Answer format:\s*(\S+)\s*\Z", instruction)
    if not listed or "/" not in listed[1] or row.get("answer") is None:
        return _Question(prompt, (output,), 0)
    names, answer = listed[1].split("/"), str(row["answer"])
    if answer not in names or answer not in output:
        raise DataError(
            f"{place}: answer {answer!r} must be one of {', '.join(names)} and occur in output"
            f" {output!r}"
        )
    before, _, after = output.rpartition(answer)
    return _Question(prompt, tuple(before + name + after for name in names), names.index(answer))


def _alpaca_prompt(instruction: str, context: str) -> str:
    """The prompt of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py), with the newline that
    LLM-Adapters puts before the response.
    """
    paired = ", paired with an input that provides further context" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n"
        + (f"### Input:\n{context}\n\n" if context else "")
        + "### Response:\n"
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
    return next(
        (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


def _answered(prompt: list[int], whole: list[int], tokenizer: Any, max_length: int) -> Example:
    """The labels of prompt and answer. The loss begins at the first token that differs from the
    prompt's own: a token that joins both holds a piece of the answer.
    """
    start = _common(prompt, whole)
    eos = tokenizer.eos_token_id
    ids = whole if eos is None or whole[-1:] == [eos] and len(whole) > start else [*whole, eos]
    return _cut(ids, [False] * start + [True] * (len(ids) - start), tokenizer, max_length)


def _cut(ids: list[int], learn: list[bool], tokenizer: Any, max_length: int) -> Example:
    """Cut to the length allowed. The last answer stays: what comes before it is cut on the left,
    and only then the end of the answer.
    """
    num_tokens, num_learned = len(ids), sum(learn)
    if len(ids) > max_length:
        end = len(learn) - learn[::-1].index(True)
        start = end
        while start > 0 and learn[start - 1]:
            start -= 1
        kept = 1 if ids[0] == tokenizer.bos_token_id else 0  # models expect their first token
        room = max_length - kept
        # one token must stand before the answer's first
        begin = max(kept, min(end - room, start - 1 + kept))
        ids = ids[:kept] + ids[begin : begin + room]
        learn = learn[:kept] + learn[begin : begin + room]
    labels = [token if counts else IGNORED for token, counts in zip(ids, learn, strict=True)]
    return Example(ids, labels, None, num_tokens - len(ids), num_learned - sum(learn))


def _running_text(
    texts: list[str], places: list[str], tokenizer: Any, max_length: int
) -> list[Example]:
    examples, eos = [], tokenizer.eos_token_id
    for place, ids in zip(places, _ids(tokenizer, texts), strict=True):
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        if len(ids) < 2:
            raise DataError(
                f"{place}: the text is a single token, nothing to predict from it; remove the row"
            )
        pieces = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
        examples += [Example(piece, list(piece)) for piece in pieces if len(piece) > 1]
    return examples
