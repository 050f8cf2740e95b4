"""Files, folders and hub names into rows with a place, and what is wrong with a value."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlora.data.arrow_rows import Row as Row
from dlora.data.arrow_rows import is_saved, read_saved
from dlora.data.row_files import not_there, read_file
from dlora.errors import DataError


class PlacedRow(NamedTuple):
    """A row, its file's columns, its place in words, and the peer whose file it is ("" where one
    file is for all).
    """

    row: Row
    columns: tuple[str, ...]
    place: str
    owner: str


_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+))?")


def read_rows(source: str, columns: Sequence[str] | None = None) -> list[Row]:
    """Every row of a file (jsonl, json, csv, tsv, parquet, arrow, each also .gz), a folder of
    save_to_disk or a hub data set.

    ``columns`` names the columns of a csv or tsv without a header; other forms carry their names
    and ignore it. A hub name is "owner/name", or "owner/name:split" where there are several splits;
    a folder takes ":split" too. Raises DataError: no such file, not readable, no rows, a damaged
    row (with its number, the first data row is 1).
    """
    path, (folder, _, split) = Path(source), source.rpartition(":")
    try:
        if path.is_dir() and is_saved(path):
            rows = read_saved(path, None, source)
        elif split and Path(folder).is_dir() and is_saved(Path(folder)):
            rows = read_saved(Path(folder), split, folder)
        else:
            rows = (
                _from_hub(source)
                if not path.exists() and _is_hub_name(path)
                else read_file(path, columns)
            )
    except OSError as error:  # a name of 300 letters, no right to look
        raise DataError(f"{source} cannot be read: {error.strerror}") from error
    if not rows:
        raise DataError(f"{source} holds no rows; expected at least one")
    return rows


def check_there(source: str) -> None:
    """Raise DataError where `read_rows` would find nothing. A name that may be a hub data set is
    not looked for.
    """
    path, folder = Path(source), Path(source.rpartition(":")[0] or source)
    try:
        missing = not path.exists() and not folder.is_dir() and not _is_hub_name(path)
    except OSError:  # a name of 300 letters, no right to look: the reader says so
        return
    if missing:
        raise not_there(path)


def read_placed(
    source: str | Mapping[str, str], columns: Sequence[str] | None, required: Sequence[str]
) -> list[PlacedRow]:
    """The rows of one source or of {peer: source}, one after the other; each has a value in the
    required columns.

    Raises DataError as `read_rows` and `require_column` do.
    """
    placed = []
    for owner, file in source.items() if isinstance(source, Mapping) else [("", source)]:
        rows = read_rows(file, columns)
        for column in required:
            require_column(rows, column, file)
        known = tuple(columns_of(rows))
        placed += [
            PlacedRow(row, known, f"{file} row {number}", owner)
            for number, row in enumerate(rows, start=1)
        ]
    return placed


def require_column(rows: Sequence[Row], column: str, source: str) -> list[Any]:
    """The values of one column, (rows,). Raises DataError when no row has it, or naming the row
    that lacks it.
    """
    known = columns_of(rows)
    if column not in known:
        near = difflib.get_close_matches(column, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(
            f"{source} has no column {column}; its columns are {', '.join(known)}{hint}"
        )
    for number, row in enumerate(rows, start=1):
        if is_missing(row.get(column)):
            found = "" if row.get(column) is None else " (it is NaN)"
            raise DataError(
                f"{source} row {number} has no value for {column}{found}; fill it in or remove"
                " the row"
            )
    return [row[column] for row in rows]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns that occur in any row, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def is_missing(value: Any) -> bool:
    """Whether a value is none: null, or the NaN that pandas writes for it."""
    return value is None or isinstance(value, float) and math.isnan(value)


def as_text(value: Any, column: str, place: str) -> str:
    """A value as text: numbers are written out. Raises DataError naming `place` for all else and
    for an empty text.
    """
    text = (
        str(value)
        if isinstance(value, int) or isinstance(value, float) and math.isfinite(value)
        else value
    )
    if not isinstance(text, str):
        found = (
            "missing"
            if value is None
            else str(value)
            if isinstance(value, float)
            else f"a {type(value).__name__}"
        )
        raise DataError(f"{place}: {column} is {found}; expected text")
    if not text.strip():
        raise DataError(f"{place}: {column} is empty; fill it in or remove the row")
    return text


def _is_hub_name(path: Path) -> bool:
    # "data/train.txt" and a name inside a folder that exists are paths with a mistake in them, not
    # hub names.
    return (
        bool(_HUB.fullmatch(str(path)))
        and not re.fullmatch(r"\.[a-z]\w*", path.suffix)
        and not path.parent.is_dir()
    )


def _from_hub(source: str) -> list[Row]:
    match = _HUB.fullmatch(source)
    assert match is not None
    import datasets

    try:
        loaded = datasets.load_dataset(match["name"], split=match["split"])
    except Exception as error:  # the hub client raises a dozen unrelated types
        what = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{source} is no file here, and as a hub data set it cannot be loaded: {what}"
        ) from error
    if match["split"] is None:
        if len(loaded) != 1:  # guessing could train and score on the same rows
            raise DataError(
                f"{source} has the splits {', '.join(loaded)}; say which:"
                f" {source}:{next(iter(loaded))}"
            )
        loaded = next(iter(loaded.values()))
    return list(loaded)
