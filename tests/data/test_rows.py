"""Rows from files: what is read, and what is said when it cannot be."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlora.data.rows import Row, as_text, read_placed, read_rows, require_column
from dlora.errors import DataError

assets = pytest.mark.skipif(
    "DLORA_ASSETS" not in os.environ, reason="DLORA_ASSETS names no folder with the real data"
)


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refusal(source: str, columns: list[str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source, columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


ROWS = [{"text": 'a "b", c\nd\te', "label": "1"}, {"text": "line\u2028sep\x85arated", "label": "0"}]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_form_reads_the_same(tmp_path: Path, form: str, zipped: bool) -> None:
    quoted = [[row["text"].replace('"', '""'), row["label"]] for row in ROWS]
    delimiter = "," if form == "csv" else "\t"
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n")
    elif form == "json":
        write(path, json.dumps(ROWS))
    elif form == "parquet":
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        lines = [["text", "label"], *([f'"{text}"', label] for text, label in quoted)]
        write(path, "\r\n".join(delimiter.join(line) for line in lines) + "\r\n")
    if zipped:
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert read_rows(str(path)) == ROWS


def test_stray_quotes_are_characters(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.tsv", 'text\tlabel\n"open and never closed\t1\nthe "end" of it\t0\n'
    )
    assert [row["text"] for row in read_rows(source)] == [
        '"open and never closed',
        'the "end" of it',
    ]


def test_two_stray_quotes_do_not_swallow_the_lines_between(tmp_path: Path) -> None:
    # With quotes understood this is one whole row of two columns: ('begin\t1\nmiddle\t0\nend',
    # '1').
    source = write(tmp_path / "a.tsv", 'text\tlabel\n"begin\t1\nmiddle\t0\nend"\t1\n')
    assert [row["text"] for row in read_rows(source)] == ['"begin', "middle", 'end"']


def test_quoted_csv_whose_lines_all_have_a_comma(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", 'text,label\n"one, two\nthree",1\n')
    assert read_rows(source) == [{"text": "one, two\nthree", "label": "1"}]


def test_byte_order_mark_and_huge_fields(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "\ufefftext,label\n" + "x" * 200_000 + ",1\n")
    assert list(read_rows(source)[0]) == ["text", "label"]


def test_quoted_fields_keep_their_line_ends_and_any_size(tmp_path: Path) -> None:
    text = "one\r\ntwo\r" + "x\n" * 100_000
    assert read_rows(write(tmp_path / "a.csv", f'text,label\r\n"{text}",1\r\n')) == [
        {"text": text, "label": "1"}
    ]


def test_columns_name_a_table_without_header(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "gj04\t1\nbc01\t0\n")
    assert read_rows(source, ["id", "label"]) == [
        {"id": "gj04", "label": "1"},
        {"id": "bc01", "label": "0"},
    ]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n')) == [
        {"text": "a"},
        {"text": "b"},
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.tsv", "text\tlabel\na\t1\nb\n", "a.tsv row 2 has 1 columns, expected 2"),
        ("a.csv", 'text,label\n"a, b",1\nc,d,0\n', "a.csv row 2 has 3 columns, expected 2"),
        ("a.tsv", "text\ttext\na\tb\n", "has the column 'text' twice"),
        ("a.tsv", "text\tlabel\n", "holds no rows"),
        ("a.csv", "", "is empty"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": \n',
            "a.jsonl row 2 is not JSON (Expecting value at character 10)",
        ),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "a.jsonl row 2 is a list; expected an object"),
        ("a.json", '{"text": "a"}', "holds one dict; expected a list of objects"),
        ("a.json", '[{"text": "a"}, 3]', "row 2 is a int; expected an object"),
        ("a.json", '[{"text"', "is not JSON"),
        ("a.json", "[]", "holds no rows"),
        ("a.txt", "a\nb\n", "is a .txt file; expected .jsonl, .json, .csv, .tsv, .parquet"),
        ("a.csv", b"text,label\na,1\n\xff,0\n", "a.csv line 3 is not UTF-8"),
        ("a.csv.gz", "text,label\n", "cannot be read: Not a gzipped file"),
        ("a.parquet", "no", "is not parquet"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, text: str | bytes, said: str) -> None:
    assert said in refusal(write(tmp_path / name, text))


def test_a_ragged_row_is_counted_from_the_first_data_row(tmp_path: Path) -> None:
    source = write(tmp_path / "a.tsv", "a\t1\nb\t0\nc\n")
    assert "row 3 has 1 columns, expected 2" in refusal(source, ["text", "label"])
    assert "row 1 has 2 columns, expected 3" in refusal(source, ["id", "text", "label"])


def test_missing_files(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "a\tb\n1\t2\n")
    assert refusal(str(tmp_path / "trian.tsv")).endswith(
        "trian.tsv does not exist; did you mean train.tsv?"
    )
    assert "nothing in" in refusal(str(tmp_path / "zzzzzzz.csv"))
    assert "nor does its folder" in refusal(str(tmp_path / "none" / "train.tsv"))
    assert "is a folder" in refusal(str(tmp_path))


def test_a_hub_name_offline_is_one_line(tmp_path: Path) -> None:
    code = "from dlora.data.rows import read_rows\nfrom dlora.errors import DataError\n"
    code += (
        "try: read_rows('no-such-owner/no-such-name:train')\nexcept DataError as error:"
        " print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith(
        "no-such-owner/no-such-name:train is no file here, and as a hub data set"
    )


def test_a_path_in_a_folder_that_exists_is_no_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert "data/train does not exist" in refusal("data/train")
    assert "owner/name.csv does not exist" in refusal("owner/name.csv")


def test_require_column() -> None:
    rows: list[Row] = [{"text": "a", "label": 0}, {"text": "b", "label": None}, {"text": "c"}]
    assert require_column(rows, "text", "f") == ["a", "b", "c"]
    with pytest.raises(
        DataError, match="^f has no column txt; its columns are text, label; did you mean text\\?$"
    ):
        require_column(rows, "txt", "f")
    with pytest.raises(DataError, match="^f row 2 has no value for label"):
        require_column(rows, "label", "f")
    with pytest.raises(DataError, match="^f row 2 has no value for label"):
        require_column([rows[0], rows[2]], "label", "f")


def test_read_placed_says_where_and_whose(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    two = write(tmp_path / "two.jsonl", '{"text": "c", "label": 1}\n')
    placed = read_placed({"x": one, "y": two}, None, ["text"])
    assert [(row.place, row.owner) for row in placed] == [
        (f"{one} row 1", "x"),
        (f"{one} row 2", "x"),
        (f"{two} row 1", "y"),
    ]
    assert placed[2].columns == ("text", "label")
    with pytest.raises(DataError, match="one.jsonl has no column label"):
        read_placed({"x": one, "y": two}, None, ["label"])


def test_as_text() -> None:
    assert [as_text(value, "c", "p") for value in ("a ", 3, 2.5)] == ["a ", "3", "2.5"]
    for value, said in (
        (" ", "p: c is empty"),
        (None, "p: c is missing; expected text"),
        ([1], "p: c is a list"),
    ):
        with pytest.raises(DataError, match=said):
            as_text(value, "c", "p")


@assets
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("glue/SST-2/train.tsv", 67_349),
        ("glue/SST-2/dev.tsv", 872),
        ("glue/QNLI/dev.tsv.gz", 5_463),
        ("glue/RTE/train.tsv.gz", 2_490),
        ("glue/RTE/dev.tsv.gz", 277),
        ("glue/STS-B/train.tsv.gz", 5_749),
        ("glue/STS-B/dev.tsv.gz", 1_500),
        ("glue/MNLI/dev.csv.gz", 19_647),
        ("multiuser/reviews-by-domain/books/train.tsv.gz", 1_700),
        ("multiuser/reviews-by-domain/airline/dev.tsv.gz", 300),
        ("commonsense/boolq/test.json.gz", 3_270),
        ("instruct/dolly15k/dolly15k.jsonl.gz", 15_015),
    ],
)
def test_real_files_lose_no_row(name: str, rows: int) -> None:
    assert len(read_rows(f"{os.environ['DLORA_ASSETS']}/data/{name}")) == rows


@assets
def test_real_files_without_header() -> None:
    glue = f"{os.environ['DLORA_ASSETS']}/data/glue"
    assert (
        len(read_rows(f"{glue}/CoLA/train.tsv.gz", ["source", "label", "mark", "sentence"]))
        == 8_551
    )
    assert (
        len(read_rows(f"{glue}/CoLA/dev.tsv.gz", ["source", "label", "mark", "sentence"])) == 1_043
    )
    # The first row of this published file has a space where a tab belongs.
    names = ["id", "qid1", "qid2", "question1", "question2", "label"]
    assert "row 1 has 5 columns, expected 6" in refusal(f"{glue}/QQP/qqp_subset.tsv.gz", names)
