"""Causal-lm rows by their columns: prompts, chats, choices, plain text, and where the loss looks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from dlora.errors import DataError
from dlora.rows import PlacedRow, Row, as_text

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


class _Question(NamedTuple):
    """A prompt and its possible answers; training sees the one at `gold`."""

    prompt: str
    answers: tuple[str, ...]
    gold: int


def encode_causal(
    placed: list[PlacedRow], tokenizer: Any, max_length: int, with_choices: bool
) -> tuple[list[Example], list[Choice]]:
    """Rows (at least one) as examples, in the form that their columns say; choices where rows have options.

    Without `with_choices` only the right option is tokenised. Raises DataError: unknown columns, or which row is wrong
    and what to do.
    """
    kinds = list(dict.fromkeys(row.columns for row in placed))
    if len(kinds) > 1:  # several files, each in its own form
        groups = [[row for row in placed if row.columns == kind] for kind in kinds]
        parts = [encode_causal(group, tokenizer, max_length, with_choices) for group in groups]
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
            raise ValueError(f"it rewrites earlier turns, so turn {turn + 1} cannot be told apart; take one answer a row")
        start, end = (_common(prefix, ids) for prefix in _ids(tokenizer, [before, after], special=False))
        learn[start:end] = [True] * (end - start)
    return ids, learn
