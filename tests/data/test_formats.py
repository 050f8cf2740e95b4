"""Rows of causal-lm: how each form is written, where the loss looks, what is said about a bad
row.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from dlora.data.formats import Example
from dlora.data.load import encode_evaluation, load_data
from kit.character_tokenizer import PLAIN, learnt, make_tokenizer, refusal, section, whole, write

assets = pytest.mark.skipif(
    "DLORA_ASSETS" not in os.environ, reason="DLORA_ASSETS names no folder with the real data"
)

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{"
    " m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def one(tmp_path: Path, row: dict[str, Any], tokenizer: Any = PLAIN, **keys: Any) -> Example:
    source = write(tmp_path / "one.jsonl", [row])
    data = load_data(section(source, **{"max_length": 400, **keys}), "causal-lm", 1, tokenizer, 0)
    assert data.peers["peer-0"] == data.evaluation and len(data.evaluation) == 1
    return data.evaluation[0]


def test_prompt_and_completion(tmp_path: Path) -> None:
    example = one(tmp_path, {"prompt": "1+1=", "completion": "2"})
    assert whole(example) == "<s>1+1=2</s>" and learnt(example) == "2</s>"
    without_eos = make_tokenizer(eos=False)
    assert (
        learnt(one(tmp_path, {"prompt": "1+1=", "completion": "2"}, without_eos), without_eos)
        == "2"
    )


def test_the_prompt_is_cut_on_the_left_and_the_answer_at_its_end(tmp_path: Path) -> None:
    long = one(tmp_path, {"prompt": "abcdefgh", "completion": "123"}, max_length=8)
    assert whole(long) == "<s>fgh123</s>" and learnt(long) == "123</s>"
    longer = one(tmp_path, {"prompt": "abcdefgh", "completion": "123456789"}, max_length=8)
    assert whole(longer) == "<s>1234567" and learnt(longer) == "1234567"
    no_first = make_tokenizer(bert=True)  # no beginning-of-sequence token: one of the prompt stays
    longer = one(
        tmp_path, {"prompt": "abcdefgh", "completion": "123456789"}, no_first, max_length=8
    )
    assert whole(longer, no_first) == "h1234567" and learnt(longer, no_first) == "1234567"


def test_alpaca_and_dolly_write_the_same_prompt(tmp_path: Path) -> None:
    alpaca = one(tmp_path, {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert (
        whole(alpaca)
        == "<s>Below is an instruction that describes a task, paired with an input that provides"
        " further context. Write a response that appropriately completes the request.\n\n###"
        " Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>"
    )
    assert learnt(alpaca) == "3</s>"
    assert one(tmp_path, {"instruction": "Add.", "context": "1 2", "response": 3}) == alpaca
    bare = one(tmp_path, {"instruction": "Add.", "input": "", "output": ""})
    assert (
        whole(bare)
        == "<s>Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n</s>"
    )
    assert learnt(bare) == "</s>" and one(tmp_path, {"instruction": "Add.", "output": ""}) == bare


def test_running_text_is_cut_into_pieces(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "abcdefgh"}, {"text": "xyz"}])
    data = load_data(section(source, max_length=4), "causal-lm", 1, PLAIN, 0)
    pieces = ["<s>abc", "defg", "h</s>", "<s>xyz"]  # a lone </s> would teach nothing
    assert [whole(piece) for piece in data.evaluation] == pieces
    assert all(piece.labels == piece.input_ids for piece in data.evaluation)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_chats_learn_the_answers_only(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(template=template)
    turns = [
        ("system", "S"),
        ("user", "one"),
        ("assistant", "uno"),
        ("user", "two"),
        ("assistant", "dos"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"messages": messages, "prompt": "p", "completion": "c"}
    example = one(tmp_path, row, tokenizer)
    assert (
        whole(example, tokenizer)
        == "<system>S\n<user>one\n<assistant>uno\n<user>two\n<assistant>dos\n"
    )
    assert learnt(example, tokenizer).replace("\n", "") == "unodos"
    greeting = one(tmp_path, {"messages": messages[2:3]}, tokenizer)  # nothing before the answer
    assert learnt(greeting, tokenizer).replace("\n", "").endswith("uno")
    cut = one(tmp_path, row, tokenizer, max_length=6)
    assert learnt(cut, tokenizer).strip() == "dos" and len(cut.input_ids) == 6


REWRITES = "{{ messages | length }}" + CHATML
REFUSES = "{{ raise_exception('no system role') }}"
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, [ASSISTANT], "this is a chat, and the tokenizer of this model has no chat template"),
        (CHATML, "hello", "messages must be a list of {role, content}, both text"),
        (CHATML, [{"role": "user"}], "messages must be a list of {role, content}, both text"),
        (CHATML, [USER], "messages has no turn of the assistant"),
        (REFUSES, [ASSISTANT], "the chat template refuses these messages: no system role"),
        (REWRITES, [USER, ASSISTANT], "it rewrites earlier turns, so turn 2 cannot be told apart"),
    ],
)
def test_bad_chats(tmp_path: Path, template: str | None, messages: Any, said: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"messages": messages}])
    refusal(
        f"{source} row 1: ", section(source), "causal-lm", 1, make_tokenizer(template=template), 0
    )
    refusal(said, section(source), "causal-lm", 1, make_tokenizer(template=template), 0)


ANSWER_FORMAT = {
    "instruction": "Is it?\n\nAnswer format: yes/no",
    "output": "no: it is no",
    "answer": "no",
}
OPTIONS = {"prompt": "1+1=", "options": ["1", "2", 3], "answer": 1}


def test_choices(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl",
        [ANSWER_FORMAT, {**ANSWER_FORMAT, "answer": "yes", "output": "no: it is yes"}],
    )
    data = load_data(section(source, max_length=400), "causal-lm", 1, PLAIN, 0)
    assert [choice.answer for choice in data.choices] == [1, 0]
    options = [[learnt(option) for option in choice.options] for choice in data.choices]
    assert options == [["no: it is yes</s>", "no: it is no</s>"]] * 2
    assert [learnt(example) for example in data.evaluation] == [
        "no: it is no</s>",
        "no: it is yes</s>",
    ]
    assert data.peers["peer-0"] == data.evaluation


@pytest.mark.parametrize(
    ("options", "answer", "gold"),
    [(["1", "2", 3], 1, 1), (["1", "2", 3], "1", 0), ([1, 2, 3], 3, 2), ([1, 2, 3], "3", 2)],
)
def test_options_by_index_or_text(
    tmp_path: Path, options: list[Any], answer: Any, gold: int
) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "p", "options": options, "answer": answer}])
    data = load_data(section(source), "causal-lm", 1, PLAIN, 0)
    (choice,) = data.choices
    assert choice.answer == gold and [learnt(option) for option in choice.options] == [
        "1</s>",
        "2</s>",
        "3</s>",
    ]
    assert data.evaluation == [choice.options[gold]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "a", "answer": "b"},
            "has the columns question, answer; causal-lm knows messages; prompt + compl",
        ),
        ({"prompt": "", "completion": "b"}, "row 1: prompt is empty"),
        ({"prompt": "a", "completion": None}, "row 1: completion is missing"),
        ({"instruction": "a", "output": {}}, "row 1: output is a dict; expected text"),
        ({**OPTIONS, "answer": 3.5}, "row 1: answer 3.5 is no option, and no index from 0 to 2"),
        ({**OPTIONS, "answer": -1}, "row 1: answer -1 is no option"),
        ({**OPTIONS, "options": ["1"]}, "expected a list of at least two different answers"),
        ({**OPTIONS, "options": ["1", 1]}, "expected a list of at least two different answers"),
        (
            {**ANSWER_FORMAT, "answer": "maybe"},
            "answer 'maybe' must be one of yes, no and occur in output 'no: it is",
        ),
        (
            {**ANSWER_FORMAT, "answer": "yes"},
            "answer 'yes' must be one of yes, no and occur in output 'no: it is no'",
        ),
    ],
)
def test_bad_causal_rows(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    refusal(said, section(write(tmp_path / "a.jsonl", [row])), "causal-lm", 1, PLAIN, 0)


def test_what_teaches_nothing_is_refused(tmp_path: Path) -> None:
    bare = make_tokenizer(eos=False)
    empty = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}])
    refusal("row 1: completion is empty", section(empty), "causal-lm", 1, bare, 0)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    single = write(tmp_path / "b.jsonl", [{"text": "a"}])
    refusal("row 1: the text is a single token", section(single), "causal-lm", 1, bare, 0)


def test_each_file_has_its_own_form(tmp_path: Path) -> None:
    rows = {"a": {"prompt": "p", "completion": "c"}, "b": {"text": "t"}}
    files = {peer: write(tmp_path / f"{peer}.jsonl", [row]) for peer, row in rows.items()}
    data = load_data(
        section(files, files, partition={"kind": "files"}), "causal-lm", None, PLAIN, 0
    )
    assert [whole(row) for row in data.peers["a"] + data.peers["b"]] == ["<s>pc</s>", "<s>t</s>"]
    assert data.evaluation == data.peers["a"] + data.peers["b"]


@assets
def test_real_commonsense() -> None:
    root = os.environ["DLORA_ASSETS"]
    tokenizer = AutoTokenizer.from_pretrained(f"{root}/models/stories260K/hf")
    boolq = section(
        f"{root}/data/commonsense/boolq/test.json.gz", max_length=64, limit=50, eval_limit=50
    )
    data = load_data(boolq, "causal-lm", 4, tokenizer, 0)
    answers = {
        tuple(learnt(option, tokenizer).replace("▁", " ") for option in c.options)
        for c in data.choices
    }
    assert answers == {("the correct answer is true</s>", "the correct answer is false</s>")}
    assert len(data.choices) == len(data.evaluation) == 50 and {
        choice.answer for choice in data.choices
    } == {0, 1}
    assert max(len(example.input_ids) for example in data.evaluation) == 64
    assert all(example.input_ids[0] == tokenizer.bos_token_id for example in data.evaluation)


@assets
@pytest.mark.parametrize("name", ["openbookqa", "ARC-Easy", "ARC-Challenge"])
def test_every_real_question_has_options(name: str) -> None:
    source = f"{os.environ['DLORA_ASSETS']}/data/commonsense/{name}/test.json.gz"
    examples, choices = encode_evaluation(
        section(source, eval_limit=200, max_length=600), "causal-lm", PLAIN, None, 0
    )
    assert len(choices) == len(examples) == 200
    assert all(
        choice.options[choice.answer] == example
        for choice, example in zip(choices, examples, strict=True)
    )
