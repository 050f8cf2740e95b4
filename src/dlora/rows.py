"""Files and hub names into rows, and what is wrong with them."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlora.errors import DataError

Row = dict[str, Any]


class PlacedRow(NamedTuple):
    """A row, its file's columns, its place in words, and the peer whose file it is ("" where one file is for all)."""

    row: Row
    columns: tuple[str, ...]
    place: str
    owner: str


_FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+))?")


def read_rows(source: str, columns: Sequence[str] | None = None) -> list[Row]:
    """Every row of a jsonl, json (list of objects), csv, tsv or parquet file (each also .gz) or of a hub data set.

    ``columns`` names the columns of a csv or tsv without a header; other forms carry their names and ignore it.
    A hub name is "owner/name", or "owner/name:split" where there are several splits.
    Raises DataError: no such file, not readable, no rows, a damaged row (with its number, the first data row is 1).
    """
    path = Path(source)
    try:
        there = path.exists()
    except OSError as error:  # 300 letters, no right to look
        raise DataError(f"{source} cannot be read: {error.strerror}") from error
    rows = _from_hub(source) if not there and _is_hub_name(path) else _from_file(path, columns)
    if not rows:
        raise DataError(f"{source} holds no rows; expected at least one")
    return rows


def read_placed(source: str | Mapping[str, str], columns: Sequence[str] | None, required: Sequence[str]) -> list[PlacedRow]:
    """The rows of one source or of {peer: source}, one after the other; each has a value in the required columns.

    Raises DataError as `read_rows` and `require_column` do.
    """
    placed = []
    for owner, file in source.items() if isinstance(source, Mapping) else [("", source)]:
        rows = read_rows(file, columns)
        for column in required:
            require_column(rows, column, file)
        known = tuple(columns_of(rows))
        placed += [PlacedRow(row, known, f"{file} row {number}", owner) for number, row in enumerate(rows, start=1)]
    return placed


def require_column(rows: Sequence[Row], column: str, source: str) -> list[Any]:
    """The values of one column, (rows,). Raises DataError when no row has it, or naming the row that lacks it."""
    known = columns_of(rows)
    if column not in known:
        near = difflib.get_close_matches(column, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"{source} has no column {column}; its columns are {', '.join(known)}{hint}")
    for number, row in enumerate(rows, start=1):
        if row.get(column) is None:
            raise DataError(f"{source} row {number} has no value for {column}; fill it in or remove the row")
    return [row[column] for row in rows]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns that occur in any row, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def as_text(value: Any, column: str, place: str) -> str:
    """A value as text: numbers are written out. Raises DataError naming `place` for all else and for an empty text."""
    text = str(value) if isinstance(value, int | float) else value
    if not isinstance(text, str):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{place}: {column} is {found}; expected text")
    if not text.strip():
        raise DataError(f"{place}: {column} is empty; fill it in or remove the row")
    return text


def _is_hub_name(path: Path) -> bool:
    # "data/train.txt" and a name inside a folder that exists are paths with a mistake in them, not hub names.
    return bool(_HUB.fullmatch(str(path))) and not re.fullmatch(r"\.[a-z]\w*", path.suffix) and not path.parent.is_dir()


def _from_hub(source: str) -> list[Row]:
    match = _HUB.fullmatch(source)
    assert match is not None
    import datasets

    try:
        loaded = datasets.load_dataset(match["name"], split=match["split"])
    except Exception as error:  # the hub client raises a dozen unrelated types
        what = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{source} is no file here, and as a hub data set it cannot be loaded: {what}") from error
    if match["split"] is None:
        if len(loaded) != 1:  # guessing could train and score on the same rows
            raise DataError(f"{source} has the splits {', '.join(loaded)}; say which: {source}:{next(iter(loaded))}")
        loaded = next(iter(loaded.values()))
    return list(loaded)


def _from_file(path: Path, columns: Sequence[str] | None) -> list[Row]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    form = "".join(suffixes[-2:-1] if zipped else suffixes[-1:])
    if not path.exists():
        raise DataError(f"{path} does not exist; {_beside(path)}")
    if form not in _FORMS or path.is_dir():
        found = "a folder" if path.is_dir() else f"a {form or 'nameless'} file"
        raise DataError(f"{path} is {found}; expected {', '.join(_FORMS)}, or one of these with .gz")
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if zipped else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if form == ".parquet":
        return _parquet(raw, path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {row} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    if not text.strip():
        raise DataError(f"{path} is empty; expected rows")
    if form == ".jsonl":
        return _json_lines(text, path)
    if form == ".json":
        return _json_list(text, path)
    return _table(text, "," if form == ".csv" else "\t", path, columns)


def _beside(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"nor does its folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"beside it lies {near[0]}" if near else f"nothing in {folder} has a name like it"


def _parquet(raw: bytes, path: Path) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets, whose own reader keeps a second copy
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: list[Row] = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not parquet: {' '.join(str(error).split())}") from error
    return rows


def _json_lines(text: str, path: Path) -> list[Row]:
    lines = [line for line in text.split("\n") if line.strip()]  # splitlines would also split at U+2028 and U+0085
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at character {error.pos + 1}"
            raise DataError(f"{path} row {number} is not JSON ({reason}); expected one object a line") from error
        rows.append(_object(value, path, number))
    return rows


def _json_list(text: str, path: Path) -> list[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many publish JSON lines under the name .json
            return _json_lines(text, path)
        raise DataError(f"{path} is not JSON ({error}); expected a list of objects") from error
    if not isinstance(values, list):
        raise DataError(f"{path} holds one {type(values).__name__}; expected a list of objects")
    return [_object(value, path, number) for number, value in enumerate(values, start=1)]


def _object(value: Any, path: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{path} row {number} is a {type(value).__name__}; expected an object such as {{"text": ...}}')
    return value


def _table(text: str, delimiter: str, path: Path, columns: Sequence[str] | None) -> list[Row]:
    """Quoted fields (RFC 4180) or none (GLUE's tsv, where a quote is a character): whichever fits every row."""
    quoted = _quoted(text, delimiter)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    plain = [line.split(delimiter) for line in lines if line]
    width = len(columns) if columns else 0

    # Two stray quotes can swallow the tsv lines between them and still leave whole rows.
    swallowed = quoted is not None and delimiter == "\t" and len(quoted) < len(plain) and len(plain[0]) > 1
    if quoted is not None and _ragged(quoted, width) is None and not (swallowed and _ragged(plain, width) is None):
        table = quoted
    elif _ragged(plain, width) is None:
        table = plain
    else:
        table = plain if quoted is None else quoted
        bad = _ragged(table, width)
        assert bad is not None
        number = bad + (1 if columns else 0)
        found, expected = len(table[bad]), width or len(table[0])
        raise DataError(f"{path} row {number} has {found} columns, expected {expected}; mend that row")

    names = list(columns) if columns else table.pop(0)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        hint = "rename one" if columns else "rename one, or name the columns in data.columns if the first row is data"
        raise DataError(f"{path} has the column {twice[0]!r} twice; {hint}")
    return [dict(zip(names, fields, strict=True)) for fields in table]


def _quoted(text: str, delimiter: str) -> list[list[str]] | None:
    """The rows with quotes understood, or None where they do not balance."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a field above 128 KiB; a C long may be 32 bits
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return [row for row in reader if row]
    except csv.Error:
        return None


def _ragged(table: list[list[str]], width: int) -> int | None:
    """The index of the first row without `width` fields (0: as many as the first row), or None."""
    expected = width or len(table[0])
    return next((index for index, row in enumerate(table) if len(row) != expected), None)
