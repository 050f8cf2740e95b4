"""Whose examples: how rows are divided, drawn, labelled and batched, and what is said about a bad
row.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dlora.data.batches import Batch, BatchStream, collate
from dlora.data.formats import Example
from dlora.data.load import encode_evaluation, load_data
from dlora.errors import DataError
from kit.character_tokenizer import BERT, PLAIN, refusal, section, whole, write

assets = pytest.mark.skipif(
    "DLORA_ASSETS" not in os.environ, reason="DLORA_ASSETS names no folder with the real data"
)


def reviews(tmp_path: Path, count: int = 20, name: str = "train.jsonl") -> str:
    return write(
        tmp_path / name,
        [{"text": f"row {i}", "label": ["bad", "good"][i % 2]} for i in range(count)],
    )


def test_classification(tmp_path: Path) -> None:
    data = load_data(section(reviews(tmp_path), max_length=6), "classification", 3, BERT, 0)
    assert data.label_names == ("bad", "good")
    assert [len(rows) for rows in data.peers.values()] == [7, 7, 6]
    assert data.label_counts is not None and list(data.label_counts) == list(data.peers)
    for peer, rows in data.peers.items():
        counted = {
            name: sum(row.labels == i for row in rows) for i, name in enumerate(data.label_names)
        }
        assert data.label_counts[peer] == counted
    assert whole(data.evaluation[1], BERT) == "[CLS]row [SEP]"  # cut to 6 tokens
    assert data.evaluation[1].labels == 1 and data.evaluation[1].token_type_ids == [0] * 6
    assert data.choices == []
    assert data == load_data(section(reviews(tmp_path), max_length=6), "classification", 3, BERT, 0)


def test_pairs_have_type_ids_only_where_the_tokenizer_gives_them(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"q": "ab", "s": 1, "label": label} for label in (0, 1)])
    pairs = section(source, text=["q", "s"])
    example = load_data(pairs, "classification", 1, BERT, 0).evaluation[0]
    assert whole(example, BERT) == "[CLS]ab[SEP]1[SEP]" and example.token_type_ids == [
        0,
        0,
        0,
        0,
        1,
        1,
    ]
    assert load_data(pairs, "classification", 1, PLAIN, 0).evaluation[0].token_type_ids is None


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([2.0, 10, "3"], ("2", "3", "10")),
        (["b", "a", "10"], ("10", "a", "b")),
    ],
)
def test_labels_are_sorted_as_numbers_if_all_are(
    tmp_path: Path, values: list[Any], names: tuple[str, ...]
) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "x", "label": value} for value in values])
    assert load_data(section(source), "classification", 1, PLAIN, 0).label_names == names


def test_labels_given_fix_the_order(tmp_path: Path) -> None:
    source = reviews(tmp_path, 2)
    data = load_data(
        section(source, labels=["good", "neutral", "bad"]), "classification", 1, PLAIN, 0
    )
    assert data.label_names == ("good", "neutral", "bad") and [
        row.labels for row in data.evaluation
    ] == [2, 0]
    assert data.label_counts == {"peer-0": {"good": 1, "neutral": 0, "bad": 1}}


def test_limits_draw_by_the_seed_and_keep_the_order(tmp_path: Path) -> None:
    limited = section(reviews(tmp_path), limit=8, eval_limit=5)

    def drawn(seed: int) -> tuple[list[int], list[int]]:
        data = load_data(limited, "classification", 1, PLAIN, seed)
        both = data.peers["peer-0"], data.evaluation
        train, evaluation = (
            [int(whole(row).removeprefix("<s>row ")) for row in rows] for rows in both
        )
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
    with pytest.raises(
        DataError, match="train.jsonl row 1: the label 'bad' is not among .*: good, poor;"
    ):
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
        (
            {"text": "x", "label": 0.5},
            "eval.jsonl row 2: label is 0.5; expected the name or number of a class",
        ),
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
        refusal(
            said,
            section(keys.pop("train", source), source, **keys),
            "classification",
            num_peers,
            tokenizer,
            0,
        )

    same = write(tmp_path / "same.jsonl", [{"text": "x", "label": "bad"}] * 3)
    refused("every training row has the label 'bad'; a classifier needs at least two", train=same)
    refused("20 rows to divide; lower peers.count", num_peers=21)
    refused(
        "train.jsonl has no column txt; its columns are text, label; did you mean text?", text="txt"
    )
    refused(
        "row 2: the label 'good' is not among those of training or data.labels: bad;",
        labels=["bad"],
    )
    refused("data.labels names 'bad' twice", labels=["bad", "good", "bad"])
    refused("none.csv does not exist", train=str(tmp_path / "none.csv"))
    refused("train.jsonl has no column site", partition={"kind": "by-column", "column": "site"})
    refused(
        "data.max_length 2: the tokenizer adds 2 tokens; make it larger",
        max_length=2,
        tokenizer=BERT,
    )


def test_collate_pads_on_the_right() -> None:
    batch = collate([Example([5, 6, 7], [-100, 6, 7]), Example([8], [8])], pad_token_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert (
        batch.token_type_ids is None and batch.input_ids.dtype == batch.labels.dtype == torch.int64
    )


def test_collate_classes_and_type_ids() -> None:
    batch = collate([Example([5], 0, [1]), Example([5, 6], 2, [0, 1])], pad_token_id=0)
    assert batch.labels.tolist() == [0, 2] and batch.labels.dtype == torch.int64
    assert batch.token_type_ids is not None and batch.token_type_ids.tolist() == [[1, 0], [0, 1]]
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.labels.is_meta and moved.token_type_ids is not None


@given(st.integers(1, 30), st.integers(0, 3), st.integers(0, 100), st.integers(0, 100))
def test_the_stream_is_a_function_of_the_position(
    num_examples: int, seed: int, start: int, count: int
) -> None:
    stream = BatchStream(num_examples, seed, "peer-0")
    assert (
        stream.take(start, count)
        == BatchStream(num_examples, seed, "peer-0").take(0, start + count)[start:]
    )
    for which in (0, 2, 1):
        assert sorted(stream.take(which * num_examples, num_examples)) == list(range(num_examples))


def test_streams_differ_by_seed_name_and_pass() -> None:
    given = ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 50))
    orders = [BatchStream(50, seed, name).take(start, 50) for seed, name, start in given]
    assert len({tuple(order) for order in orders}) == 4
    # the same in every process and on every machine
    assert BatchStream(5, 0, "peer-0").take(0, 5) == [4, 1, 0, 2, 3]


@assets
def test_real_reviews() -> None:
    root = os.environ["DLORA_ASSETS"]
    tokenizer = AutoTokenizer.from_pretrained(f"{root}/models/stories260K/hf")
    domains = {
        name: f"{root}/data/multiuser/reviews-by-domain/{name}/dev.tsv.gz"
        for name in ("books", "dvd")
    }
    divided = section(domains, domains, text="sentence", max_length=16, partition={"kind": "files"})
    reviewed = load_data(divided, "classification", None, tokenizer, 0)
    assert {peer: len(rows) for peer, rows in reviewed.peers.items()} == {"books": 300, "dvd": 300}
    assert reviewed.label_names == ("0", "1")
