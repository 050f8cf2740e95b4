"""A chat as the tokenizer's template writes it, and which of its tokens belong to answers."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from typing import Any

from dlora.errors import DataError

Messages = list[dict[str, Any]]
Render = Callable[..., str]

# The names of ShareGPT's turns, as its descendants write them.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def encode_chat(
    messages: Any,
    place: str,
    tokenizer: Any,
    tools: Any = None,
    fold_system: bool = False,
    first: int = 0,
) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and for each whether it belongs to an answer: a turn of the assistant
    from turn ``first`` on.

    ``tools`` is a list of functions or its JSON, for the template; ``fold_system`` writes the
    system turn into the first of the user. Raises DataError naming ``place``: no template, turns
    that are none, a template that refuses or leaves out.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{place}: this is a chat, and the tokenizer of this model has no chat template; take a"
            " model that has one, or write the columns prompt and completion"
        )
    turns = _checked(messages, place, first)
    functions = _functions(tools, place)
    if fold_system and turns[0]["role"] == "system":
        turns, first = _folded(turns, place), max(0, first - 1)

    def render(turns: Messages, prompt: bool = False, functions: Any = functions) -> str:
        text = tokenizer.apply_chat_template(
            turns, tools=functions, tokenize=False, add_generation_prompt=prompt
        )
        return str(text)

    try:
        turns = _with_contents(turns, render)
        whole = render(turns)
        _check_written(turns, functions, whole, render, place)
        if not first and re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
            marked = tokenizer.apply_chat_template(
                turns, tools=functions, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, learn = (
                list(marked["input_ids"]),
                [bool(mark) for mark in marked["assistant_masks"]],
            )
        else:
            ids, learn = _by_text(whole, _answers(turns, whole, render, first), tokenizer)
    except DataError:
        raise
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())
        raise DataError(
            f"{place}: the chat template refuses these messages: {reason}{_advice(turns, render)}"
        ) from error
    if not any(learn):
        raise DataError(
            f"{place}: the chat template marks no token as the assistant's; remove the row"
        )
    return ids, learn


def from_sharegpt(turns: Any, place: str) -> Any:
    """Turns of {from, value} as messages of {role, content}; turns that are messages already stay
    as they are.
    """
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns
    ):
        return turns
    for number, turn in enumerate(turns, start=1):
        if turn["from"] not in _ROLES:
            known = ", ".join(_ROLES)
            raise DataError(
                f"{place}: turn {number} of conversations is from {turn['from']!r}; known are"
                f" {known}"
            )
    return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def _checked(messages: Any, place: str, first: int) -> Messages:
    """The turns without the keys that are null: tables give each turn the keys of all turns."""
    shape = "messages must be a list of {role, content}, both text"
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise DataError(f"{place}: {shape}")
    turns: Messages = []
    for number, turn in enumerate(messages, start=1):
        kept = {key: value for key, value in turn.items() if value is not None or key == "content"}
        calls = isinstance(kept.get("tool_calls"), list) and bool(kept["tool_calls"])
        content = kept.get("content")
        if not isinstance(kept.get("role"), str) or not (
            isinstance(content, str) or content is None and calls
        ):
            found = (
                f"turn {number} has the role {kept.get('role')!r} and as content {_kind(content)}"
            )
            raise DataError(f"{place}: {shape} (content is null only beside tool_calls); {found}")
        turns.append(kept)
    if not any(turn["role"] == "assistant" for turn in turns[first:]):
        raise DataError(
            f"{place}: messages has no turn of the assistant, so nothing to learn; remove the row"
        )
    return turns


def _kind(content: Any) -> str:
    return "null" if content is None else f"a {type(content).__name__}"


def _functions(tools: Any, place: str) -> Any:
    """The list of tools for the template; None where there are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: tools is no JSON ({error}); expected a list of functions"
            ) from error
    if not (
        tools is None or isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise DataError(f"{place}: tools is a {type(tools).__name__}; expected a list of functions")
    return tools or None


def _folded(turns: Messages, place: str) -> Messages:
    """The turns with the system turn written at the beginning of the first turn of the user, after
    it a blank line, as in Gemma's own template.
    """
    if len(turns) < 2 or turns[1]["role"] != "user":
        raise DataError(
            f"{place}: data.fold_system needs a turn of the user after that of the system; remove"
            " the row"
        )
    return [{**turns[1], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]


def _with_contents(turns: Messages, render: Render) -> Messages:
    """The turns as they are, or "" for a content of null where the template writes or refuses
    None.
    """
    if all(turn.get("content") is not None for turn in turns):
        return turns
    filled = [{**turn, "content": turn.get("content") or ""} for turn in turns]
    try:
        return turns if render(turns).count("None") == render(filled).count("None") else filled
    except Exception:  # a template raises what it likes
        return filled


def _check_written(turns: Messages, functions: Any, whole: str, render: Render, place: str) -> None:
    """Raise DataError where the template leaves something out: it would be missing in training, and
    nobody would see it.
    """
    if (
        turns[0]["role"] == "system"
        and turns[0]["content"].strip()
        and turns[1:]
        and render(turns[1:]) == whole
    ):
        raise DataError(f"{place}: the chat template leaves out the turn of the system; {_FOLD}")
    if functions and render(turns, functions=None) == whole:
        raise DataError(
            f"{place}: the chat template leaves out the tools; take a model that knows them, or"
            " remove them"
        )
    for call in (call for turn in turns for call in turn.get("tool_calls", ())):
        name = _called(call).get("name")
        if not isinstance(name, str) or name not in whole:
            what = f"the chat template does not write the call of {name!r}"
            raise DataError(
                f"{place}: {what}; take a model that knows tool_calls, or write the call as content"
            )


_FOLD = (
    "set data.fold_system: true to write it at the beginning of the first turn of the user, or"
    " remove it"
)


def _advice(turns: Messages, render: Render) -> str:
    """What to do about a template that refuses: whether it is the system turn alone that it does
    not take.
    """
    if turns[0]["role"] != "system" or not turns[1:]:
        return ""
    try:
        render(turns[1:])
    except Exception:  # a template raises what it likes
        return ""
    return f"; it has no role system: {_FOLD}"


def _called(call: Any) -> dict[str, Any]:
    """The function of a tool call, which is in OpenAI's form or a flat one."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    return inner if isinstance(inner, dict) else {}


def _answers(turns: Messages, whole: str, render: Render, first: int) -> list[tuple[int, int]]:
    """Where the answers begin and end in ``whole``: what the chat with each has more than the chat
    before it.

    A template that shows an answer otherwise once others follow (Qwen3 drops what was thought) is
    asked where it put them.
    """
    answers = [turn for turn in range(first, len(turns)) if turns[turn]["role"] == "assistant"]
    spans = []
    for turn in answers:
        # a template takes at least one turn
        before = render(turns[:turn], prompt=True) if turn else ""
        after = render(turns[: turn + 1])
        if not (whole.startswith(before) and whole.startswith(after)):
            marked = _by_marks(turns, whole, render, answers, False) or _by_marks(
                turns, whole, render, answers, True
            )
            if marked is None:
                rewrites = f"it rewrites earlier turns, so turn {turn + 1} cannot be told apart"
                raise ValueError(f"{rewrites}; take one answer a row")
            return marked
        spans.append((len(before), len(after)))
    return spans


def _by_marks(
    turns: Messages, whole: str, render: Render, answers: list[int], strip: bool
) -> list[tuple[int, int]] | None:
    """The same, found in the whole chat, which is rendered with a mark at the end of each answer.
    None where the marks change more than that. ``strip``: for templates that cut the blanks at the
    end of a content.
    """
    marks = {turn: f"@@answer-{turn}@@" for turn in answers}
    marked = copy.deepcopy(turns)
    for turn, mark in marks.items():
        if calls := marked[turn].get("tool_calls"):  # these stand after the content
            _called(calls[-1])["name"] += mark
        else:
            content = marked[turn]["content"]
            marked[turn]["content"] = (content.rstrip() if strip else content) + mark
    text = render(marked)
    if any(text.count(mark) != 1 for mark in marks.values()):
        return None
    spans, done = [], 0  # done: characters of `whole` up to the last mark
    for turn, mark in marks.items():
        head = render(marked[:turn], prompt=True) if turn else ""
        for earlier in marks.values():
            head = head.rpartition(earlier)[2]
        if not whole.startswith(head, done):
            return None
        begin = done + len(head)
        piece, _, text = text.partition(mark)
        if not whole.startswith(piece, done):
            return None
        done += len(piece)
        closing = render(marked[: turn + 1]).rpartition(mark)[2]
        if begin > done:
            return None
        spans.append((begin, done + _common(closing, whole[done:])))
    return spans if whole[done:] == text else None


def _by_text(
    whole: str, spans: list[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """The tokens of ``whole``, and which of them lie in the spans (of characters)."""
    prefixes = [whole[:at] for span in spans for at in span]
    ids, *cut = tokenizer([whole, *prefixes], add_special_tokens=False)["input_ids"]
    learn = [False] * len(ids)
    bounds = [_common(prefix, ids) for prefix in cut]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        learn[start:end] = [True] * (end - start)
    return ids, learn


def _common(one: Any, other: Any) -> int:
    """How many items both begin with."""
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)
