"""Labels that are numbers, several labels a row, labels of words: what is read, and what is
refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dlora.data.batches import collate
from dlora.data.formats import Example
from dlora.data.load import FederatedData, load_data, load_own_data
from dlora.errors import ConfigError
from kit.character_tokenizer import BERT, refusal, section, write


def rows(path: Path, *labels: Any) -> str:
    """Their number is in the text."""
    return write(path, [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)])


def load(task: str, source: str, **keys: Any) -> FederatedData:
    return load_data(section(source, **keys), task, 1, BERT, 0)


def test_numbers_are_read_from_json_and_from_tables(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\na\t5.000\nb\t-1\nc\t2e-1\n")
    for source in (str(tmp_path / "a.tsv"), rows(tmp_path / "a.jsonl", 5, -1.0, 0.2)):
        data = load("regression", source)
        assert [row.labels for row in data.evaluation] == [5.0, -1.0, 0.2]
        assert data.label_names is None and data.label_counts is None
        labels = collate(data.evaluation, 0).labels
        assert labels.is_floating_point() and labels.shape == (3,)
    left = load("regression", str(tmp_path / "a.tsv"), no_label=["-1"])
    assert [row.labels for row in left.evaluation] == [5.0, 0.2]


@pytest.mark.parametrize("label", ["good", True, [1.0], "1,5"])
def test_what_is_no_number_is_refused(tmp_path: Path, label: Any) -> None:
    source = rows(tmp_path / "a.jsonl", 1, label)
    said = f"a.jsonl row 2: label is {label!r}; expected a number"
    refusal(said, section(source), "regression", 1, BERT, 0)


def test_several_labels_are_a_list_or_have_commas(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\na,"red, blue"\nb,""\nc,red\n')
    for source in (
        str(tmp_path / "a.csv"),
        rows(tmp_path / "a.jsonl", ["red", "blue"], [], "red"),
    ):
        data = load("multi-label", source)
        assert data.label_names == ("blue", "red") and data.label_counts is None
        assert [row.labels for row in data.evaluation] == [(1.0, 1.0), (0.0, 0.0), (0.0, 1.0)]
        assert collate(data.evaluation, 0).labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    numbers = load("multi-label", rows(tmp_path / "b.jsonl", [10, 9], [2.0]))
    assert numbers.label_names == ("2", "9", "10")


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (3, "row 2: label is 3; expected a list such as"),
        (
            "['red', 'blue']",
            "such as ['red', 'green'], or a text with commas between",
        ),
        (["red", 0.5], "row 2: label is 0.5; expected the name or number of a class"),
        (["red", ""], "row 2: label is empty"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(tmp_path: Path, label: Any, said: str) -> None:
    refusal(said, section(rows(tmp_path / "a.jsonl", ["red"], label)), "multi-label", 1, BERT, 0)


def test_a_label_that_training_has_not(tmp_path: Path) -> None:
    train, other = rows(tmp_path / "a.jsonl", ["red"]), rows(tmp_path / "b.jsonl", ["red", "green"])
    said = "b.jsonl row 1: the label 'green' is not among those of training or data.labels: red"
    refusal(said, section(train, other), "multi-label", 1, BERT, 0)


def test_a_real_peer_lists_the_labels_of_all(tmp_path: Path) -> None:
    source = rows(tmp_path / "a.jsonl", ["red"], ["blue"])
    with pytest.raises(ConfigError, match="data.labels is missing"):
        load_own_data(section(source), "multi-label", "north", BERT, 0)
    listed = section(source, labels=["red", "green", "blue"])
    data = load_own_data(listed, "multi-label", "north", BERT, 0)
    assert [row.labels for row in data.evaluation] == [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    numbers = section(rows(tmp_path / "b.jsonl", 1.5, 2))
    assert load_own_data(numbers, "regression", "north", BERT, 0).label_names is None


def words(path: Path, *pairs: tuple[Any, Any]) -> str:
    return write(path, [{"tokens": text, "tags": label} for text, label in pairs])


WORDS = {"text": "tokens", "label": "tags", "max_length": 12}


def of_tokens(example: Example) -> list[int]:
    assert isinstance(example.labels, list)
    return example.labels


def test_the_first_token_of_a_word_has_its_label(tmp_path: Path) -> None:
    """The tokenizer has a token for each character, blanks among them."""
    source = words(tmp_path / "a.jsonl", (["ab", "c", "de"], ["B-X", "O", "I-X"]), ("a b", "O O"))
    data = load("token-classification", source, **WORDS)
    assert data.label_names == ("B-X", "I-X", "O")
    long, short = data.evaluation
    tokens = BERT.convert_ids_to_tokens(long.input_ids)
    labels = {place: label for place, label in enumerate(of_tokens(long)) if label != -100}
    assert [tokens[place].strip("#") for place in labels] == ["a", "c", "d"]
    assert [*labels.values()] == [0, 2, 1]
    assert [label for label in of_tokens(short) if label != -100] == [2, 2]
    batch = collate(data.evaluation, 0)
    assert batch.labels.shape == batch.input_ids.shape and batch.labels[0, 0] == -100


def test_words_that_max_length_takes_are_counted(tmp_path: Path) -> None:
    source = words(tmp_path / "a.jsonl", (["ab", "c", "de"], ["B-X", "O", "I-X"]))
    data = load("token-classification", source, **{**WORDS, "max_length": 5})
    assert data.facts["train"] == {"rows": 1, "cut_rows": 1, "cut_share": pytest.approx(2 / 3)}


def test_numbers_of_listed_labels(tmp_path: Path) -> None:
    """As data sets of the hub have them."""
    source = words(tmp_path / "a.jsonl", (["a", "b"], [0, 2]))
    data = load("token-classification", source, **WORDS, labels=["O", "B-X", "I-X"])
    assert [label for label in of_tokens(data.evaluation[0]) if label != -100] == [0, 2]


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((["a", "b"], ["O"]), "row 1: tokens has 2 words and tags 1 labels; each word needs one"),
        (([], []), "row 1: tokens has 0 words"),
        (({"a": 1}, ["O"]), "row 1: tokens is {'a': 1}; expected a list such as"),
        ((["a"], [["O"]]), "row 1: tags is a list"),
    ],
)
def test_words_that_do_not_fit_their_labels(tmp_path: Path, pair: Any, said: str) -> None:
    source = section(words(tmp_path / "a.jsonl", pair), **WORDS)
    refusal(said, source, "token-classification", 1, BERT, 0)
