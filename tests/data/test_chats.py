"""Chats of every form: what the template is handed, where the answers are, and what is said where
it cannot be done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlora.data.formats import Example
from dlora.data.load import load_data
from kit.character_tokenizer import PLAIN, learnt, make_tokenizer, refusal, section, whole, write

Row = dict[str, Any]

ASKS = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAINLY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}" + ASKS
# As Qwen3's: answers after the last turn of the user begin with what was thought, and earlier ones
# do not.
THINKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last"
    " = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<{{ m.role }}>{% if m.role =="
    " 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content | trim"
    " }}{% for c in m.tool_calls or [] %}[call {{ c.function.name }}]{% endfor %}|{% endfor %}"
    + ASKS
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%"
    " endif %}" + PLAINLY
)
IGNORES_SYSTEM = PLAINLY.replace("in messages", "in messages if m.role != 'system'")
CALLS = (
    "{% for t in tools or [] %}[can {{ t.function.name }}]{% endfor %}{% for m in messages %}<{{"
    " m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}[call {{ c.function.name"
    " }}({{ c.function.arguments | tojson }})]{% endfor %}|{% endfor %}" + ASKS
)


def turns(*pairs: tuple[str, str]) -> list[Row]:
    return [{"role": role, "content": content} for role, content in pairs]


TWO = turns(
    ("user", "q 1"), ("assistant", "answer 1"), ("user", "and then"), ("assistant", "the end")
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a town"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}}
CALLED = [
    *turns(("user", "rain?")),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    *turns(("tool", "dry"), ("assistant", "No.")),
]


def one(tmp_path: Path, row: Row, template: str, **keys: Any) -> tuple[Example, str, str]:
    """The one example that a row gives, its text, and what of it is learnt."""
    tokenizer = make_tokenizer(template=template)
    source = write(tmp_path / "one.jsonl", [row])
    data = load_data(section(source, **{"max_length": 500, **keys}), "causal-lm", 1, tokenizer, 0)
    [example] = data.evaluation
    return example, whole(example, tokenizer), learnt(example, tokenizer)


def refused(
    tmp_path: Path, said: str, row: Row, template: str | None = PLAINLY, **keys: Any
) -> None:
    source = write(tmp_path / "one.jsonl", [row])
    refusal(said, section(source, **keys), "causal-lm", 1, make_tokenizer(template=template), 0)


def test_a_template_that_rewrites_earlier_turns(tmp_path: Path) -> None:
    """Field case 2: each answer is learnt as the template shows it in the whole chat."""
    _, text, learns = one(tmp_path, {"messages": TWO}, THINKS)
    assert (
        text
        == "<user>q 1|<assistant>answer 1|<user>and then|<assistant><think>\n\n</think>\n\nthe end|"
    )
    assert learns == "answer 1|<think>\n\n</think>\n\nthe end|"


def test_a_rewriting_template_and_contents_that_mislead(tmp_path: Path) -> None:
    """Field case 2: an answer that stands in the question too, blanks at its ends, an empty one."""
    messages = turns(
        ("user", "yes|"),
        ("assistant", " yes "),
        ("user", "yes"),
        ("assistant", "yes"),
        ("user", "<assistant>"),
    )
    messages += turns(("assistant", ""), ("user", "so"), ("assistant", "yes\n"))
    _, text, learns = one(tmp_path, {"messages": messages}, THINKS)
    assert text.count("yes") == 5
    assert learns == "yes|yes||<think>\n\n</think>\n\nyes|"


def test_a_rewriting_template_with_calls(tmp_path: Path) -> None:
    """Field cases 2 and 17: the call is learnt where the whole chat has it."""
    more = [*CALLED, *turns(("user", "and now?"), ("assistant", "Wet."))]
    _, text, learns = one(
        tmp_path, {"messages": more}, THINKS.replace("m.content | trim", "(m.content or '') | trim")
    )
    assert text.startswith(
        "<user>rain?|<assistant>[call weather]|<tool>dry|<assistant>No.|<user>and now?|"
    )
    assert learns == "[call weather]|No.|<think>\n\n</think>\n\nWet.|"


def test_one_turn_of_a_rewriting_template_is_what_it_was(tmp_path: Path) -> None:
    """Field case 2: where nothing is rewritten, the tokens in the loss are those of the chat less
    the chat before.
    """
    _, _, learns = one(tmp_path, {"messages": TWO[:2]}, THINKS)
    assert learns == "<think>\n\n</think>\n\nanswer 1|"


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    """Field case 2: the message says what to do."""
    refused(
        tmp_path,
        "row 1: the chat template refuses these messages: it rewrites",
        {"messages": TWO},
        "{{ messages[-1].content }}",
    )
    refused(tmp_path, "take one answer a row", {"messages": TWO}, "{{ messages[-1].content }}")


SYSTEM = turns(("system", "Be brief."), *((turn["role"], turn["content"]) for turn in TWO))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            NO_SYSTEM,
            (
                "refuses these messages: System role not supported; it has no role system: set"
                " data.fold_system: true"
            ),
        ),
        (IGNORES_SYSTEM, "leaves out the turn of the system; set data.fold_system: true"),
    ],
)
def test_a_template_without_the_role_system(tmp_path: Path, template: str, said: str) -> None:
    """Field case 16: the message says what to do, and the option does it; a turn that vanishes is
    no less refused.
    """
    refused(tmp_path, said, {"messages": SYSTEM}, template)
    _, text, learns = one(tmp_path, {"messages": SYSTEM}, template, fold_system=True)
    assert text == "<user>Be brief.\n\nq 1|<assistant>answer 1|<user>and then|<assistant>the end|"
    assert learns == "answer 1|the end|"
    refused(
        tmp_path,
        "needs a turn of the user after",
        {"messages": [SYSTEM[0], TWO[1]]},
        template,
        fold_system=True,
    )


def test_fold_system_leaves_other_chats_alone(tmp_path: Path) -> None:
    """Field case 16."""
    assert one(tmp_path, {"messages": TWO}, PLAINLY, fold_system=True) == one(
        tmp_path, {"messages": TWO}, PLAINLY
    )


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tool_calls(tmp_path: Path, tools: Any) -> None:
    """Field case 17: the template is handed calls, tools and the turn of the tool; the call is
    learnt, the tool's is not.
    """
    _, text, learns = one(tmp_path, {"messages": CALLED, "tools": tools}, CALLS)
    call = '[call weather({"town": "Bonn"})]|'
    assert text == f"[can weather]<user>rain?|<assistant>{call}<tool>dry|<assistant>No.|"
    assert learns == f"{call}No.|"


def test_keys_that_a_table_adds_are_not_there(tmp_path: Path) -> None:
    """Field case 17: parquet gives every turn the keys of all, with null where they are not."""
    every = [{"tool_calls": None, "name": None, **turn} for turn in CALLED]
    named = CALLS.replace("m.tool_calls or []", "m.tool_calls").replace(
        "{% for c", "{% if 'tool_calls' in m %}{% for c"
    )
    named = named.replace("]{% endfor %}|", "]{% endfor %}{% endif %}|")
    assert (
        one(tmp_path, {"messages": every}, named)[1:]
        == one(tmp_path, {"messages": CALLED}, CALLS)[1:]
    )


def test_null_is_not_written_as_a_word(tmp_path: Path) -> None:
    """Field case 17: a template that would write None is handed an empty content."""
    prints = CALLS.replace("m.content or ''", "m.content")
    assert (
        one(tmp_path, {"messages": CALLED}, prints)[1:]
        == one(tmp_path, {"messages": CALLED}, CALLS)[1:]
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": CALLED}, "does not write the call of 'weather'"),
        ({"messages": TWO, "tools": [TOOL]}, "leaves out the tools"),
        ({"messages": TWO, "tools": "{"}, "tools is no JSON"),
        ({"messages": TWO, "tools": 3}, "tools is a int; expected a list of functions"),
        (
            {"messages": [TWO[0], {"role": "assistant", "content": None}]},
            "turn 2 has the role 'assistant' and as content null",
        ),
        (
            {"messages": [TWO[0], {"role": "assistant", "content": [{"type": "text"}]}]},
            "as content a list",
        ),
        (
            {"messages": [TWO[0], {"role": "assistant", "content": float("nan")}]},
            "as content a float",
        ),
        (
            {"messages": [TWO[0], {"role": "assistant", "content": None, "tool_calls": []}]},
            "null only beside tool_calls",
        ),
        ({"messages": []}, "no turn of the assistant"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "turn 1 of conversations is from 'narrator'; known are human",
        ),
        (
            {"prompt": TWO[:1], "completion": "x"},
            "prompt is a list of messages, so completion must be one too",
        ),
        ({"prompt": TWO[:2], "completion": TWO[2:3]}, "no turn of the assistant"),
    ],
)
def test_bad_chats(tmp_path: Path, row: Row, said: str) -> None:
    """Field cases 17 and 18: one line that names the row."""
    refused(tmp_path, said, row)
    refused(tmp_path, "one.jsonl row 1: ", row)


def test_sharegpt(tmp_path: Path) -> None:
    """Field case 18: `conversations` of {from, value}, and of {role, content}."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    said = [{"from": names[turn["role"]], "value": turn["content"]} for turn in SYSTEM]
    as_messages = one(tmp_path, {"messages": SYSTEM}, PLAINLY)
    assert one(tmp_path, {"conversations": said}, PLAINLY) == as_messages
    assert one(tmp_path, {"conversations": SYSTEM}, PLAINLY) == as_messages


def test_prompt_and_completion_of_messages(tmp_path: Path) -> None:
    """Field case 18: TRL's conversational form; the answers in the prompt are not learnt."""
    for template in (PLAINLY, THINKS):
        _, text, learns = one(tmp_path, {"prompt": TWO[:3], "completion": TWO[3:]}, template)
        assert text == one(tmp_path, {"messages": TWO}, template)[1]
        assert learns == ("the end|" if template == PLAINLY else "<think>\n\n</think>\n\nthe end|")


def test_marked_templates_learn_the_completion_only(tmp_path: Path) -> None:
    """Field case 18: a template that marks every answer marks those of the prompt too."""
    marks = PLAINLY.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    assert one(tmp_path, {"prompt": TWO[:3], "completion": TWO[3:]}, marks)[2] == "the end|"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "these are preference rows (DPO, reward models)",
        ),
        (
            {"chosen": TWO, "rejected": TWO},
            "keep the chosen answers, as prompt + completion or as messages",
        ),
        (
            {"prompt": "a", "completion": "b", "label": True},
            "label says whether the completion is wanted (KTO)",
        ),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise supervision"),
        (
            {"tokens": ["a"], "ner_tags": [0]},
            "a label for each word (NER, tagging) wants task: token-classification",
        ),
        ({"question": "a", "context": "b", "answers": {}}, "extractive question answering"),
    ],
)
def test_rows_of_other_tasks(tmp_path: Path, row: Row, said: str) -> None:
    """Field cases 18 and 20: the message names what dlora does not do."""
    refused(tmp_path, said, row)


def test_a_label_that_is_no_preference_is_no_matter(tmp_path: Path) -> None:
    """Field case 18: a column called label with other values is a column as any other."""
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": 1}])
    assert learnt(load_data(section(source), "causal-lm", 1, PLAIN, 0).evaluation[0]) == "b</s>"
