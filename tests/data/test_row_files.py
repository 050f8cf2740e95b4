"""Files as spreadsheets, pandas and `datasets` write them, and files that are bombs."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.ipc  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from dlora.data.load import load_data
from dlora.data.rows import read_placed, read_rows
from dlora.errors import DataError
from kit.character_tokenizer import BERT, PLAIN, section, write

ROWS = [{"text": "schön; gut", "label": 1}, {"text": "böse, sehr", "label": 0}]


def refusal(
    source: str | Path, columns: list[str] | None = None, required: list[str] | None = None
) -> str:
    with pytest.raises(DataError) as caught:
        read_placed(str(source), columns, required or [])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("value", ["NaN", "null"])
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_nan_is_no_text(tmp_path: Path, form: str, value: str) -> None:
    """Field case 9: the row is named and refused, and nothing learns the word nan."""
    text = '{"text": "a", "x": NaN}\n{"text": VALUE, "x": 1}\n'.replace("VALUE", value)
    path = tmp_path / f"a.{form}"
    path.write_text(text if form == "jsonl" else f"[{text.strip().replace(chr(10), ',')}]")
    assert "row 2 has no value for text" in refusal(path, required=["text"])
    assert math.isnan(read_rows(str(path))[0]["x"])  # a column that nobody reads may have it


def test_nan_in_a_column_of_parquet(tmp_path: Path) -> None:
    """Field case 9."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1.5, math.nan], "label": [0, 1]}), path)
    assert "row 2 has no value for text (it is NaN)" in refusal(path, required=["text", "label"])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("column", ["text", "prompt", "completion"])
def test_nan_is_no_text_of_causal_lm(tmp_path: Path, column: str, value: str) -> None:
    """Field case 9: numbers are written out, these are none."""
    row = {"text": '"t"'} if column == "text" else {"prompt": '"p"', "completion": '"c"'}
    body = ", ".join(f'"{key}": {value if key == column else text}' for key, text in row.items())
    (tmp_path / "a.jsonl").write_text(f"{{{body}}}\n")
    with pytest.raises(DataError, match=f"a.jsonl row 1: {column} is -?(nan|inf); expected text"):
        load_data(section(str(tmp_path / "a.jsonl")), "causal-lm", 1, PLAIN, 0)


@pytest.mark.parametrize("separator", [";", "\t", ","])
@pytest.mark.parametrize("form", ["csv", "tsv"])
def test_another_separator_than_the_usual(tmp_path: Path, form: str, separator: str) -> None:
    """Field case 21: European spreadsheets write semicolons into a csv; commas in the texts are
    texts.
    """
    lines = [["text", "label"], *([f'"{row["text"]}"', str(row["label"])] for row in ROWS)]
    path = tmp_path / f"a.{form}"
    path.write_text(
        "\r\n".join(separator.join(line) for line in lines) + "\r\n", encoding="utf-8-sig"
    )
    assert read_rows(str(path)) == [{**row, "label": str(row["label"])} for row in ROWS]


def test_semicolons_without_quotes_or_header(tmp_path: Path) -> None:
    """Field case 21."""
    path = tmp_path / "a.csv"
    path.write_text("text;label\none, two;1\nthree;0\n")
    assert read_rows(str(path)) == [
        {"text": "one, two", "label": "1"},
        {"text": "three", "label": "0"},
    ]
    assert read_rows(str(path), ["a", "b"])[0] == {"a": "text", "b": "label"}
    path.write_text("one, two;1\nthree, four;0\n")  # both separators make two columns of each row
    # the usual one goes first
    assert read_rows(str(path), ["text", "label"])[0]["label"] == " two;1"


def test_a_column_of_texts_with_semicolons(tmp_path: Path) -> None:
    """Field case 21: one column stays one column."""
    path = tmp_path / "a.csv"
    path.write_text("text\none; two\nthree\n")
    assert read_rows(str(path)) == [{"text": "one; two"}, {"text": "three"}]
    path.write_text("one; two\nthree; four\n")
    assert read_rows(str(path), ["text"]) == [{"text": "one; two"}, {"text": "three; four"}]


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    """Field case 19: a data set, a dictionary of splits, of which one is named, and arrow files."""
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    assert read_rows(str(tmp_path / "one")) == ROWS
    both = datasets.DatasetDict(train=made, test=made.select([1]))
    both.save_to_disk(tmp_path / "both")
    assert (
        read_rows(f"{tmp_path}/both:test") == ROWS[1:]
        and read_rows(f"{tmp_path}/both:train") == ROWS
    )
    assert (
        f"{tmp_path}/both has the splits train, test; say which: {tmp_path}/both:train"
        in refusal(tmp_path / "both")
    )
    assert "has no split dev; it has train, test" in refusal(f"{tmp_path}/both:dev")
    assert "holds one data set, without splits; leave out :train" in refusal(
        f"{tmp_path}/one:train"
    )
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "only")
    assert read_rows(str(tmp_path / "only")) == ROWS
    [shard, *_] = sorted((tmp_path / "one").glob("*.arrow"))
    assert read_rows(str(shard)) == ROWS[:1]
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "the data set in this folder cannot be loaded" in refusal(tmp_path / "one")


def test_arrow_files_with_an_index(tmp_path: Path) -> None:
    """Field case 19: what pyarrow and pandas call feather is arrow too."""
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write(table)
    assert read_rows(str(tmp_path / "a.arrow")) == ROWS
    (tmp_path / "b.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:200])
    assert "b.arrow is no arrow file" in refusal(tmp_path / "b.arrow")


def test_a_data_set_on_disk_trains(tmp_path: Path) -> None:
    """Field case 19."""
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS * 4)).save_to_disk(tmp_path / "set")
    data = load_data(section(f"{tmp_path}/set:train"), "classification", 2, BERT, 0)
    assert data.label_names == ("0", "1") and len(data.evaluation) == 8


def test_half_a_character(tmp_path: Path) -> None:
    """Field case 38: JSON can say what no text is, and tokenizers die of it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n')
    assert "a.jsonl row 2 holds half of a character, \\ud83d" in refusal(path)
    (tmp_path / "b.json").write_text('[{"text": "a"}, {"messages": [{"content": "\\ude00"}]}]')
    assert "b.json row 2 holds half of a character" in refusal(tmp_path / "b.json")


def deep(open_: str, close: str) -> str:
    return open_ * 100_000 + close * 100_000


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{"text": "a"}\n{"text": %s}\n'), ("a.json", "[%s]")]
)
@pytest.mark.parametrize("inner", [deep("[", "]"), deep('{"a":', "}").replace(":}", ":1}")])
def test_json_100_000_deep(tmp_path: Path, name: str, text: str, inner: str) -> None:
    """Field case 38."""
    (tmp_path / name).write_text(text % inner)
    assert "lie too deep in one another" in refusal(tmp_path / name)


def test_a_number_of_5_000_digits(tmp_path: Path) -> None:
    """Field case 38."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": %s}\n' % ("9" * 5000))
    assert "a.jsonl row 1 cannot be read: a number has more than 4,300 digits" in refusal(
        tmp_path / "a.jsonl"
    )


BOUNDED = """
import resource, sys
from dlora.errors import DataError
from dlora.data.rows import read_rows
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_rows(sys.argv[1])
except DataError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def bounded(path: Path) -> str:
    """What is said about a bomb by a process that may not take much; its memory in MB is
    bounded.
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, path],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    said, megabytes = done.stdout.splitlines()
    assert int(megabytes) < 500, megabytes
    assert time.monotonic() - began < 60
    return said


def test_a_gzip_bomb(tmp_path: Path) -> None:
    """Field case 38: a small file with gigabytes inside, found early."""
    path = tmp_path / "a.jsonl.gz"
    block = gzip.compress(b" " * (1 << 24))
    path.write_bytes(block * 128)  # 2 GB in 2 MB
    assert "a.jsonl.gz grows" in (said := bounded(path)) and said.endswith(
        "times when it is unpacked; that is no text to train on"
    )


def test_packed_text_is_no_bomb(tmp_path: Path) -> None:
    """Field case 38: what repeats itself is packed well too."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        gzip.compress((json.dumps({"text": "the same " * 20, "label": 1}) + "\n").encode() * 50_000)
    )
    assert len(read_rows(str(path))) == 50_000


@pytest.mark.parametrize("kind", ["rows", pytest.param("bytes", marks=pytest.mark.slow)])
def test_a_parquet_bomb(tmp_path: Path, kind: str) -> None:
    """Field case 38: a column of one value is a few bytes, and so is a long text of one letter."""
    path = tmp_path / "a.parquet"
    if kind == "rows":
        one = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * 3_000_000, pyarrow.int8()), pyarrow.array(["a"])
        )
        table = pyarrow.table({"text": one})
    else:
        table = pyarrow.table({"text": ["a" * (1 << 22)] * 20})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=kind == "rows")
    assert path.stat().st_size < 1_000_000
    assert "stands for at least" in bounded(path)


def test_an_arrow_bomb(tmp_path: Path) -> None:
    """Field case 38."""
    table = pyarrow.table({"text": ["a" * (1 << 22)] * 20})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema, options=options) as file:
        file.write(table)
    assert (tmp_path / "a.arrow").stat().st_size < 1_000_000
    assert "stands for at least" in bounded(tmp_path / "a.arrow")


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv"])
def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, form: str) -> None:
    """Held well: files as Windows writes them."""
    rows = [{"text": "gut", "label": "1"}, {"text": "böse", "label": "0"}]
    separator = "," if form == "csv" else "\t"
    text = "\n".join(
        ["text" + separator + "label", *(f"{row['text']}{separator}{row['label']}" for row in rows)]
    )
    if form == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
    elif form == "json":
        text = json.dumps(rows, indent=1)
    (tmp_path / f"a.{form}").write_bytes(
        b"\xef\xbb\xbf" + (text + "\n").replace("\n", "\r\n").encode()
    )
    assert read_rows(str(tmp_path / f"a.{form}")) == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv"])
def test_utf_16_is_refused(tmp_path: Path, form: str, encoding: str) -> None:
    """Held well: with a mark or without one, the message says UTF-8."""
    text = (
        '{"text": "a", "label": 1}\n'
        if form == "jsonl"
        else "text,label\na,1\n".replace(",", "," if form == "csv" else "\t")
    )
    (tmp_path / f"a.{form}").write_bytes(text.encode(encoding))
    assert (
        "UTF-16" in (said := refusal(tmp_path / f"a.{form}")) and "save the file as UTF-8" in said
    )


def test_words_that_others_read_as_nothing_are_texts(tmp_path: Path) -> None:
    """Held well: "null", "NA" and "nan" in a csv are what stands there."""
    (tmp_path / "a.csv").write_text("text,label\nnull,a\nNA,b\nnan,a\nNone,b\n")
    assert [row["text"] for row in read_rows(str(tmp_path / "a.csv"))] == [
        "null",
        "NA",
        "nan",
        "None",
    ]
    data = load_data(section(str(tmp_path / "a.csv")), "classification", 1, BERT, 0)
    assert [len(example.input_ids) - 2 for example in data.evaluation] == [4, 2, 3, 4]


def test_blanks_and_umlauts_in_paths(tmp_path: Path) -> None:
    """Held well."""
    folder = tmp_path / "Größe & Maß: 50 %"
    folder.mkdir()
    source = write(folder / "für alle (neu).jsonl", ROWS)
    assert read_rows(source) == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "als Ordner")
    assert read_rows(str(folder / "als Ordner")) == ROWS
