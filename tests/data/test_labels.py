"""Labels that are none, that are scores, lists or one number twice: what is refused, warned of and
left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dlora.config.reading import parse_section
from dlora.config.training import DataSection
from dlora.data.load import FederatedData, load_data, load_own_data
from dlora.errors import ConfigError
from kit.character_tokenizer import BERT, PLAIN, make_tokenizer, refusal, section, write


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


def table(path: Path, *labels: Any) -> str:
    path.write_text(
        "text\tlabel\n"
        + "".join(f"text {number}\t{label}\n" for number, label in enumerate(labels))
    )
    return str(path)


def load(train: Any, evaluation: Any = None, **keys: Any) -> FederatedData:
    return load_data(
        section(train, evaluation, **keys),
        "classification",
        None if isinstance(train, dict) else 1,
        BERT,
        0,
    )


def refused(said: str, train: Any, evaluation: Any = None, **keys: Any) -> None:
    peers = None if isinstance(train, dict) else 1
    refusal(said, section(train, evaluation, **keys), "classification", peers, BERT, 0)


def test_scores_are_no_classes(tmp_path: Path) -> None:
    """Field case 7: refused in tsv and jsonl alike, with the row, and the message names the task
    that takes them.
    """
    for source in (
        table(tmp_path / "a.tsv", "5.0", "3.250", "1.110"),
        write(tmp_path / "a.jsonl", rows(5.0, 3.25, 1.11)),
    ):
        refused(f"{source} row 2: label is 3.25", source)
        refused("Scores want task: regression", source)
        refused("have to be listed in data.labels", source)


def test_classes_that_look_like_scores_can_be_listed(tmp_path: Path) -> None:
    """Field case 7: half a star more is a class if the user says so."""
    for source in (
        table(tmp_path / "a.tsv", "4.5", "5.0"),
        write(tmp_path / "a.jsonl", rows(4.5, "5.0")),
    ):
        assert [row.labels for row in load(source, labels=["4.5", "5.0"]).evaluation] == [0, 1]


@pytest.mark.parametrize("none", ["-1", "-", "nan", "NA", "?"])
def test_a_label_that_often_means_none(tmp_path: Path, none: str) -> None:
    """Field case 8: a warning that names the option; the option leaves the rows out, of training
    and of evaluation.
    """
    source = table(tmp_path / "a.tsv", "0", none, "1", none, "0")
    [warning] = [said for said in load(source).warnings if "often means none" in said]
    assert (
        f"2 of 5 training rows have the label '{none}'" in warning
        and f"data.no_label: ['{none}']" in warning
    )
    data = load(source, no_label=[none])
    assert data.label_names == ("0", "1") and len(data.evaluation) == 3
    assert data.label_counts == {"peer-0": {"0": 2, "1": 1}}
    assert "2 of 5 training rows have no label and are left out (data.no_label)" in data.warnings
    assert not any("often means" in said for said in load(source, labels=["0", "1", none]).warnings)


def test_rows_without_a_label_are_left_out_if_asked(tmp_path: Path) -> None:
    """Field case 8: no value, NaN, an empty text; a file without the column is still a mistake."""
    source = write(
        tmp_path / "a.jsonl", [*rows(0, None, float("nan"), "", -1, -1.0, 1), {"text": "x"}]
    )
    refused("row 2 has no value for label", source)
    data = load(source, no_label=["-1"])
    assert data.label_names == ("0", "1") and len(data.evaluation) == 2
    own = load_own_data(
        section(source, no_label=["-1"], labels=["0", "1"]), "classification", "north", BERT, 0
    )
    assert len(own.peers["north"]) == len(own.evaluation) == 2
    bare = write(tmp_path / "b.jsonl", [{"text": "x"}])
    refused(f"{bare} has no column label", source, bare, no_label=["-1"])
    refused(
        "no row has a label but those of data.no_label",
        source,
        write(tmp_path / "c.jsonl", rows(-1)),
        no_label=["-1"],
    )
    with pytest.raises(ConfigError, match="labels and no_label both name '-1'"):
        parse_section(
            DataSection, {"train": "a", "eval": "b", "labels": ["-1", "1"], "no_label": ["-1"]}
        )


def test_an_unseen_label_that_means_none(tmp_path: Path) -> None:
    """Field case 8: GLUE's test files have -1 where training has 0 and 1."""
    train, test = table(tmp_path / "a.tsv", "0", "1"), table(tmp_path / "b.tsv", "-1", "-1")
    refused("leave such rows out with data.no_label: ['-1']", train, test)


def test_one_number_written_in_two_ways(tmp_path: Path) -> None:
    """Field case 23: within training and against evaluation."""
    one, two = table(tmp_path / "a.tsv", "0", "1"), table(tmp_path / "b.tsv", "0.0", "1.0")
    refused(
        "the label '0.0' is not among those of training or data.labels: 0, 1; 0.0 and 0 are one"
        " number",
        one,
        two,
    )
    files = {"north": one, "south": two}
    refused(
        f"{two} row 1: the label '0.0' and the '0' of {one} row 1 are one number",
        files,
        partition={"kind": "files"},
    )
    assert load(two).label_names == ("0.0", "1.0")  # alike everywhere, they are names as any other
    numbers = write(tmp_path / "c.jsonl", rows(0.0, 1.0))
    # JSON has numbers, not ways to write them
    assert [row.labels for row in load(one, numbers).evaluation] == [0, 1]


@pytest.mark.parametrize("label", [[0, 1], ["a", "b"], {"a": 1}, "[0, 1]", "['a', 'b']"])
def test_several_labels_a_row(tmp_path: Path, label: Any) -> None:
    """Field case 20: the message names the task that takes them; so in a csv, where a list is
    written as text.
    """
    refused(
        "a.jsonl row 1: label is a list; several labels a row want task: multi-label",
        write(tmp_path / "a.jsonl", rows(label, label)),
    )


def test_a_label_in_brackets_is_a_label(tmp_path: Path) -> None:
    """Field case 20: not every bracket is a list."""
    assert load(write(tmp_path / "a.jsonl", rows("[red]", "[blue]"))).label_names == (
        "[blue]",
        "[red]",
    )


def test_labels_that_differ_in_blanks_or_capitals(tmp_path: Path) -> None:
    """Field case 23: siblings that are no numbers are no error, for they can be meant."""
    data = load(write(tmp_path / "a.jsonl", rows("good", "bad ", "Good", "bad")))
    assert [said for said in data.warnings if "two classes" in said] == [
        "the labels 'bad' and 'bad ' differ in blanks or capitals only, and are two classes",
        "the labels 'Good' and 'good' differ in blanks or capitals only, and are two classes",
    ]


def test_a_column_that_is_no_label(tmp_path: Path) -> None:
    """Field case 7: whole numbers that nearly every row has another of are scores or ids too."""
    data = load(write(tmp_path / "a.jsonl", rows(*range(40))))
    assert any(
        "40 training rows have 40 labels; is label the column of the label?" in said
        for said in data.warnings
    )


def test_rows_that_are_cut_are_counted(tmp_path: Path) -> None:
    """Field case 14: how many rows, and which share of what is learned."""
    source = write(
        tmp_path / "a.jsonl",
        [{"text": "x" * count, "label": count % 2} for count in (3, 4, 10, 13)],
    )
    facts = load(source, max_length=6).facts["train"]
    assert facts == {"rows": 4, "cut_rows": 2, "cut_share": (12 - 6 + 15 - 6) / (5 + 6 + 12 + 15)}
    assert load(source, max_length=15).facts["eval"] == {"rows": 4, "cut_rows": 0, "cut_share": 0.0}
    asked = write(
        tmp_path / "b.jsonl",
        [{"prompt": "p" * 9, "completion": "123"}, {"prompt": "p", "completion": "1" * 9}],
    )
    facts = load_data(section(asked, max_length=8), "causal-lm", 1, PLAIN, 0).facts["train"]
    # of the first, only the prompt
    assert facts == {"rows": 2, "cut_rows": 2, "cut_share": (10 - 7) / (4 + 10)}


def test_evaluation_rows_that_are_trained_on(tmp_path: Path) -> None:
    """One file twice, a copy under another name, a part; a few short texts are no matter."""
    source, other = write(tmp_path / "a.jsonl", rows(*[0, 1] * 30)), tmp_path / "b.jsonl"
    assert (
        load(source)
        .warnings[0]
        .startswith(
            f"data.train and data.eval are one file, {source}: 100 % of the evaluation rows"
        )
    )
    other.write_bytes(Path(source).read_bytes())
    assert load(source, str(other)).warnings == (
        "100 % of the evaluation rows are in training too; scores say little about new data",
    )
    assert load(source, str(other)).facts["eval_in_train"] == 1
    write(other, [*rows(0, 1, 0), *({"text": f"new {number}", "label": 0} for number in range(7))])
    assert load(source, str(other)).warnings[0].startswith("30 % of the evaluation rows")
    write(other, [*rows(0), *({"text": f"new {number}", "label": 0} for number in range(39))])
    assert (
        load(source, str(other)).warnings == ()
        and load(source, str(other)).facts["eval_in_train"] == 1 / 40
    )


def test_a_tokenizer_without_an_end_token_is_named(tmp_path: Path) -> None:
    chat = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    bare = make_tokenizer(eos=False, template=chat)
    asked = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    data = load_data(section(asked), "causal-lm", 1, bare, 0)
    assert (
        any("the tokenizer has no end token" in said for said in data.warnings)
        and data.facts["end_token"] is None
    )
    assert not any(
        "end token" in said for said in load_data(section(asked), "causal-lm", 1, PLAIN, 0).warnings
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talked = write(tmp_path / "b.jsonl", [{"messages": messages}])
    data = load_data(section(talked), "causal-lm", 1, bare, 0)
    # the template says where an answer ends
    assert not any("end token" in said for said in data.warnings)
