"""Examples: what is tokenised, where the loss looks, what is said about a bad row."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dlora.config import DataSection
from dlora.data import Batch, BatchStream, Example, collate, encode_evaluation, load_data
from dlora.errors import DataError, UserError

assets = pytest.mark.skipif("DLORA_ASSETS" not in os.environ, reason="DLORA_ASSETS names no folder with the real data")

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def make_tokenizer(*, bert: bool = False, eos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """Every character is a token. bert: [CLS] a [SEP] b [SEP] with type ids; else <s> first and </s> to append."""
    specials = ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    numbered = {token: index for index, token in enumerate(specials + characters)}
    backend = Tokenizer(models.WordLevel(numbered, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bert:
        single, pair, used = "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", [("[CLS]", 3), ("[SEP]", 4)]
    else:
        single, pair, used = "<s> $A", "<s> $A $B", [("<s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)
    names = ["input_ids", "token_type_ids", "attention_mask"] if bert else ["input_ids", "attention_mask"]
    given = {} if bert else {"bos_token": "<s>"}
    given |= {"eos_token": "</s>"} if eos and not bert else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", model_input_names=names, chat_template=template, **given
    )


PLAIN, BERT = make_tokenizer(), make_tokenizer(bert=True)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def section(train: Any, evaluation: Any = None, **keys: Any) -> DataSection:
    return DataSection.model_validate({"train": train, "eval": evaluation or train, **keys})


def refusal(said: str, *arguments: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_data(*arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def learnt(example: Example, tokenizer: Any = PLAIN) -> str:
    """The text of the tokens in the loss, the end written as </s>."""
    assert isinstance(example.labels, list) and len(example.labels) == len(example.input_ids)
    assert all(label in (-100, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    return "".join(tokenizer.convert_ids_to_tokens([label for label in example.labels if label != -100]))


def whole(example: Example, tokenizer: Any = PLAIN) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(example.input_ids))


def one(tmp_path: Path, row: dict[str, Any], tokenizer: Any = PLAIN, **keys: Any) -> Example:
    source = write(tmp_path / "one.jsonl", [row])
    data = load_data(section(source, **{"max_length": 400, **keys}), "causal-lm", 1, tokenizer, 0)
    assert data.peers["peer-0"] == data.evaluation and len(data.evaluation) == 1
    return data.evaluation[0]


def reviews(tmp_path: Path, count: int = 20, name: str = "train.jsonl") -> str:
    return write(tmp_path / name, [{"text": f"row {i}", "label": ["bad", "good"][i % 2]} for i in range(count)])


def test_classification(tmp_path: Path) -> None:
    data = load_data(section(reviews(tmp_path), max_length=6), "classification", 3, BERT, 0)
    assert data.label_names == ("bad", "good")
    assert [len(rows) for rows in data.peers.values()] == [7, 7, 6]
    assert data.label_counts is not None and list(data.label_counts) == list(data.peers)
    for peer, rows in data.peers.items():
        counted = {name: sum(row.labels == i for row in rows) for i, name in enumerate(data.label_names)}
        assert data.label_counts[peer] == counted
    assert whole(data.evaluation[1], BERT) == "[CLS]row [SEP]"  # cut to 6 tokens
    assert data.evaluation[1].labels == 1 and data.evaluation[1].token_type_ids == [0] * 6
    assert data.choices == []
    assert data == load_data(section(reviews(tmp_path), max_length=6), "classification", 3, BERT, 0)


def test_pairs_have_type_ids_only_where_the_tokenizer_gives_them(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"q": "ab", "s": 1, "label": label} for label in (0, 1)])
    pairs = section(source, text=["q", "s"])
    example = load_data(pairs, "classification", 1, BERT, 0).evaluation[0]
    assert whole(example, BERT) == "[CLS]ab[SEP]1[SEP]" and example.token_type_ids == [0, 0, 0, 0, 1, 1]
    assert load_data(pairs, "classification", 1, PLAIN, 0).evaluation[0].token_type_ids is None


@pytest.mark.parametrize(
    ("values", "names"),
    [(["10", "9", "-1"], ("-1", "9", "10")), ([2.0, 10, "3"], ("2", "3", "10")), (["b", "a", "10"], ("10", "a", "b"))],
)
def test_labels_are_sorted_as_numbers_if_all_are(tmp_path: Path, values: list[Any], names: tuple[str, ...]) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "x", "label": value} for value in values])
    assert load_data(section(source), "classification", 1, PLAIN, 0).label_names == names


def test_labels_given_fix_the_order(tmp_path: Path) -> None:
    source = reviews(tmp_path, 2)
    data = load_data(section(source, labels=["good", "neutral", "bad"]), "classification", 1, PLAIN, 0)
    assert data.label_names == ("good", "neutral", "bad") and [row.labels for row in data.evaluation] == [2, 0]
    assert data.label_counts == {"peer-0": {"good": 1, "neutral": 0, "bad": 1}}


def test_limits_draw_by_the_seed_and_keep_the_order(tmp_path: Path) -> None:
    limited = section(reviews(tmp_path), limit=8, eval_limit=5)

    def drawn(seed: int) -> tuple[list[int], list[int]]:
        data = load_data(limited, "classification", 1, PLAIN, seed)
        both = data.peers["peer-0"], data.evaluation
        train, evaluation = ([int(whole(row).removeprefix("<s>row ")) for row in rows] for rows in both)
        return train, evaluation

    train, evaluation = drawn(0)
    assert (len(set(train)), len(set(evaluation))) == (8, 5)
    assert train == sorted(train) and evaluation == sorted(evaluation)
    assert drawn(0) == (train, evaluation) != drawn(1)


def test_files_are_peers(tmp_path: Path) -> None:
    files = {"north": reviews(tmp_path, 4, "n.jsonl"), "south": reviews(tmp_path, 6, "s.jsonl")}
    divided = section(files, files, partition={"kind": "files"})
    data = load_data(divided, "classification", None, PLAIN, 0)
    assert {peer: len(rows) for peer, rows in data.peers.items()} == {"north": 4, "south": 6}
    assert len(data.evaluation) == 10
    refusal("peers.count is 3, data.train names 2 files", divided, "classification", 3, PLAIN, 0)


def test_encode_evaluation_takes_the_names_of_training(tmp_path: Path) -> None:
    reviewed = section(reviews(tmp_path))
    examples, choices = encode_evaluation(reviewed, "classification", PLAIN, ["good", "bad"], 0)
    assert [row.labels for row in examples[:2]] == [1, 0] and choices == []
    with pytest.raises(DataError, match="train.jsonl row 1: the label 'bad' is not among .*: good, poor;"):
        encode_evaluation(reviewed, "classification", PLAIN, ["good", "poor"], 0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"text": "x", "label": "ugly"},
            "row 2: the label 'ugly' is not among those of training or data.labels: bad, good",
        ),
        ({"text": " ", "label": "bad"}, "eval.jsonl row 2: text is empty"),
        ({"text": ["x"], "label": "bad"}, "eval.jsonl row 2: text is a list; expected text"),
        ({"text": "x", "label": 0.5}, "eval.jsonl row 2: label is 0.5; expected the name or number of a class"),
        ({"text": "x", "label": None}, "eval.jsonl row 2 has no value for label"),
        ({"text": "x"}, "eval.jsonl row 2 has no value for label"),
    ],
)
def test_bad_evaluation_rows(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    bad = write(tmp_path / "eval.jsonl", [{"text": "x", "label": "bad"}, row])
    refusal(said, section(reviews(tmp_path), bad), "classification", 2, PLAIN, 0)


def test_bad_training_data(tmp_path: Path) -> None:
    source = reviews(tmp_path)

    def refused(said: str, num_peers: int = 2, tokenizer: Any = PLAIN, **keys: Any) -> None:
        refusal(said, section(keys.pop("train", source), source, **keys), "classification", num_peers, tokenizer, 0)

    same = write(tmp_path / "same.jsonl", [{"text": "x", "label": "bad"}] * 3)
    refused("every training row has the label 'bad'; a classifier needs at least two", train=same)
    refused("20 rows to divide; lower peers.count", num_peers=21)
    refused("train.jsonl has no column txt; its columns are text, label; did you mean text?", text="txt")
    refused("row 2: the label 'good' is not among those of training or data.labels: bad;", labels=["bad"])
    refused("data.labels names 'bad' twice", labels=["bad", "good", "bad"])
    refused("none.csv does not exist", train=str(tmp_path / "none.csv"))
    refused("train.jsonl has no column site", partition={"kind": "by-column", "column": "site"})
    refused("data.max_length 2: the tokenizer adds 2 tokens; make it larger", max_length=2, tokenizer=BERT)


def test_prompt_and_completion(tmp_path: Path) -> None:
    example = one(tmp_path, {"prompt": "1+1=", "completion": "2"})
    assert whole(example) == "<s>1+1=2</s>" and learnt(example) == "2</s>"
    without_eos = make_tokenizer(eos=False)
    assert learnt(one(tmp_path, {"prompt": "1+1=", "completion": "2"}, without_eos), without_eos) == "2"


def test_the_prompt_is_cut_on_the_left_and_the_answer_at_its_end(tmp_path: Path) -> None:
    long = one(tmp_path, {"prompt": "abcdefgh", "completion": "123"}, max_length=8)
    assert whole(long) == "<s>fgh123</s>" and learnt(long) == "123</s>"
    longer = one(tmp_path, {"prompt": "abcdefgh", "completion": "123456789"}, max_length=8)
    assert whole(longer) == "<s>1234567" and learnt(longer) == "1234567"
    no_first = make_tokenizer(bert=True)  # no beginning-of-sequence token: one of the prompt stays
    longer = one(tmp_path, {"prompt": "abcdefgh", "completion": "123456789"}, no_first, max_length=8)
    assert whole(longer, no_first) == "h1234567" and learnt(longer, no_first) == "1234567"


def test_alpaca_and_dolly_write_the_same_prompt(tmp_path: Path) -> None:
    alpaca = one(tmp_path, {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert whole(alpaca) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>"
    )
    assert learnt(alpaca) == "3</s>"
    assert one(tmp_path, {"instruction": "Add.", "context": "1 2", "response": 3}) == alpaca
    bare = one(tmp_path, {"instruction": "Add.", "input": "", "output": ""})
    assert whole(bare) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n</s>"
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
    turns = [("system", "S"), ("user", "one"), ("assistant", "uno"), ("user", "two"), ("assistant", "dos")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"messages": messages, "prompt": "p", "completion": "c"}
    example = one(tmp_path, row, tokenizer)
    assert whole(example, tokenizer) == "<system>S\n<user>one\n<assistant>uno\n<user>two\n<assistant>dos\n"
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
        (None, [ASSISTANT], "messages need a chat template, the tokenizer has none"),
        (CHATML, "hello", "messages must be a list of {role, content}, both text"),
        (CHATML, [{"role": "user"}], "messages must be a list of {role, content}, both text"),
        (CHATML, [USER], "messages has no turn of the assistant"),
        (REFUSES, [ASSISTANT], "the chat template refuses these messages: no system role"),
        (REWRITES, [USER, ASSISTANT], "it rewrites earlier turns, so turn 2 cannot be told apart"),
    ],
)
def test_bad_chats(tmp_path: Path, template: str | None, messages: Any, said: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"messages": messages}])
    refusal(f"{source} row 1: ", section(source), "causal-lm", 1, make_tokenizer(template=template), 0)
    refusal(said, section(source), "causal-lm", 1, make_tokenizer(template=template), 0)


ANSWER_FORMAT = {"instruction": "Is it?\n\nAnswer format: yes/no", "output": "no: it is no", "answer": "no"}
OPTIONS = {"prompt": "1+1=", "options": ["1", "2", 3], "answer": 1}


def test_choices(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [ANSWER_FORMAT, {**ANSWER_FORMAT, "answer": "yes", "output": "no: it is yes"}])
    data = load_data(section(source, max_length=400), "causal-lm", 1, PLAIN, 0)
    assert [choice.answer for choice in data.choices] == [1, 0]
    options = [[learnt(option) for option in choice.options] for choice in data.choices]
    assert options == [["no: it is yes</s>", "no: it is no</s>"]] * 2
    assert [learnt(example) for example in data.evaluation] == ["no: it is no</s>", "no: it is yes</s>"]
    assert data.peers["peer-0"] == data.evaluation


@pytest.mark.parametrize(
    ("options", "answer", "gold"),
    [(["1", "2", 3], 1, 1), (["1", "2", 3], "1", 0), ([1, 2, 3], 3, 2), ([1, 2, 3], "3", 2)],
)
def test_options_by_index_or_text(tmp_path: Path, options: list[Any], answer: Any, gold: int) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "p", "options": options, "answer": answer}])
    data = load_data(section(source), "causal-lm", 1, PLAIN, 0)
    (choice,) = data.choices
    assert choice.answer == gold and [learnt(option) for option in choice.options] == ["1</s>", "2</s>", "3</s>"]
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
        ({**ANSWER_FORMAT, "answer": "maybe"}, "answer 'maybe' must be one of yes, no and occur in output 'no: it is"),
        ({**ANSWER_FORMAT, "answer": "yes"}, "answer 'yes' must be one of yes, no and occur in output 'no: it is no'"),
    ],
)
def test_bad_causal_rows(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    refusal(said, section(write(tmp_path / "a.jsonl", [row])), "causal-lm", 1, PLAIN, 0)


def test_what_teaches_nothing_is_refused(tmp_path: Path) -> None:
    bare = make_tokenizer(eos=False)
    empty = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}])
    refusal("row 1: completion is empty", section(empty), "causal-lm", 1, bare, 0)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    single = write(tmp_path / "b.jsonl", [{"text": "a"}])
    refusal("row 1: the text is a single token", section(single), "causal-lm", 1, bare, 0)


def test_each_file_has_its_own_form(tmp_path: Path) -> None:
    rows = {"a": {"prompt": "p", "completion": "c"}, "b": {"text": "t"}}
    files = {peer: write(tmp_path / f"{peer}.jsonl", [row]) for peer, row in rows.items()}
    data = load_data(section(files, files, partition={"kind": "files"}), "causal-lm", None, PLAIN, 0)
    assert [whole(row) for row in data.peers["a"] + data.peers["b"]] == ["<s>pc</s>", "<s>t</s>"]
    assert data.evaluation == data.peers["a"] + data.peers["b"]


def test_collate_pads_on_the_right() -> None:
    batch = collate([Example([5, 6, 7], [-100, 6, 7]), Example([8], [8])], pad_token_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch.token_type_ids is None and batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_collate_classes_and_type_ids() -> None:
    batch = collate([Example([5], 0, [1]), Example([5, 6], 2, [0, 1])], pad_token_id=0)
    assert batch.labels.tolist() == [0, 2] and batch.labels.dtype == torch.int64
    assert batch.token_type_ids is not None and batch.token_type_ids.tolist() == [[1, 0], [0, 1]]
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.labels.is_meta and moved.token_type_ids is not None


@given(st.integers(1, 30), st.integers(0, 3), st.integers(0, 100), st.integers(0, 100))
def test_the_stream_is_a_function_of_the_position(num_examples: int, seed: int, start: int, count: int) -> None:
    stream = BatchStream(num_examples, seed, "peer-0")
    assert stream.take(start, count) == BatchStream(num_examples, seed, "peer-0").take(0, start + count)[start:]
    for which in (0, 2, 1):
        assert sorted(stream.take(which * num_examples, num_examples)) == list(range(num_examples))


def test_streams_differ_by_seed_name_and_pass() -> None:
    given = ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 50))
    orders = [BatchStream(50, seed, name).take(start, 50) for seed, name, start in given]
    assert len({tuple(order) for order in orders}) == 4
    assert BatchStream(5, 0, "peer-0").take(0, 5) == [4, 1, 0, 2, 3]  # the same in every process and on every machine


@assets
def test_real_commonsense_and_reviews() -> None:
    root = os.environ["DLORA_ASSETS"]
    tokenizer = AutoTokenizer.from_pretrained(f"{root}/models/stories260K/hf")
    boolq = section(f"{root}/data/commonsense/boolq/test.json.gz", max_length=64, limit=50, eval_limit=50)
    data = load_data(boolq, "causal-lm", 4, tokenizer, 0)
    answers = {tuple(learnt(option, tokenizer).replace("▁", " ") for option in c.options) for c in data.choices}
    assert answers == {("the correct answer is true</s>", "the correct answer is false</s>")}
    assert len(data.choices) == len(data.evaluation) == 50 and {choice.answer for choice in data.choices} == {0, 1}
    assert max(len(example.input_ids) for example in data.evaluation) == 64
    assert all(example.input_ids[0] == tokenizer.bos_token_id for example in data.evaluation)

    domains = {name: f"{root}/data/multiuser/reviews-by-domain/{name}/dev.tsv.gz" for name in ("books", "dvd")}
    divided = section(domains, domains, text="sentence", max_length=16, partition={"kind": "files"})
    reviewed = load_data(divided, "classification", None, tokenizer, 0)
    assert {peer: len(rows) for peer, rows in reviewed.peers.items()} == {"books": 300, "dvd": 300}
    assert reviewed.label_names == ("0", "1")


@assets
@pytest.mark.parametrize("name", ["openbookqa", "ARC-Easy", "ARC-Challenge"])
def test_every_real_question_has_options(name: str) -> None:
    source = f"{os.environ['DLORA_ASSETS']}/data/commonsense/{name}/test.json.gz"
    examples, choices = encode_evaluation(section(source, eval_limit=200, max_length=600), "causal-lm", PLAIN, None, 0)
    assert len(choices) == len(examples) == 200
    assert all(choice.options[choice.answer] == example for choice, example in zip(choices, examples, strict=True))
