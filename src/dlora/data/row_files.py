"""One file into rows: JSON lines, a JSON list, tables; packed by gzip or not."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlora.data.arrow_rows import FREE_BYTES, MOST_TIMES, Row, read_arrow, read_parquet
from dlora.errors import DataError

FORMS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_SEPARATORS = (",", "\t", ";")  # European spreadsheets write the last into a csv
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # surrogates come in pairs, and one alone is no text
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_file(path: Path, columns: Sequence[str] | None) -> list[Row]:
    """Every row of a file. ``columns`` names the columns of a csv or tsv without a header.

    Raises DataError: no such file or form, not readable, a damaged row (with its number, the first
    data row is 1).
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    form = "".join(suffixes[-2:-1] if zipped else suffixes[-1:])
    if not path.exists():
        raise not_there(path)
    if form not in FORMS or path.is_dir():
        found = "a folder" if path.is_dir() else f"a {form or 'nameless'} file"
        raise DataError(
            f"{path} is {found}; expected {', '.join(FORMS)}, one of these with .gz, or a folder of"
            " save_to_disk"
        )
    try:
        raw = _inflate(path) if zipped else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    if form in (".parquet", ".arrow"):
        return read_parquet(raw, path) if form == ".parquet" else read_arrow(raw, path)
    text = _decode(raw, path)
    if not text.strip():
        raise DataError(f"{path} is empty; expected rows")
    if form == ".jsonl":
        return _json_lines(text, path)
    if form == ".json":
        return _json_list(text, path)
    return _table(text, "," if form == ".csv" else "\t", path, columns)


def _inflate(path: Path) -> bytes:
    """What a .gz holds; refused where it grows beyond what text does."""
    parts, count = [], 0
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as file:
        while part := file.read(1 << 20):
            parts.append(part)
            count += len(part)
            if count > max(FREE_BYTES, MOST_TIMES * packed.tell()):
                times = count // packed.tell()
                raise DataError(
                    f"{path} grows {times} times when it is unpacked; that is no text to train on"
                )
    return b"".join(parts)


def _decode(raw: bytes, path: Path) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            raise DataError(f"{path} is {encoding}, not UTF-8; save the file as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {row} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error
    if "\0" in text[:1000]:  # UTF-16 without a mark
        raise DataError(f"{path} holds zero bytes, as UTF-16 does; save the file as UTF-8")
    return text


def not_there(path: Path) -> DataError:
    """The error of a file that is missing, with what lies where it should be."""
    folder = path.parent
    if not folder.is_dir():
        return DataError(f"{path} does not exist; nor does its folder {folder}")
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=1)
    beside = f"did you mean {near[0]}?" if near else f"nothing in {folder} has a name like it"
    return DataError(f"{path} does not exist; {beside}")


def _parse_json(text: str, where: str) -> Any:
    """One JSON value. Raises DataError; a json.JSONDecodeError is left to the caller."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise DataError(
            f"{where} cannot be read: lists or objects lie too deep in one another"
        ) from error
    except ValueError as error:
        raise DataError(f"{where} cannot be read: a number has more than 4,300 digits") from error


def _json_lines(text: str, path: Path) -> list[Row]:
    # splitlines would also split at U+2028 and U+0085
    lines = [line for line in text.split("\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            value = _parse_json(line, f"{path} row {number}")
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at character {error.pos + 1}"
            raise DataError(
                f"{path} row {number} is not JSON ({reason}); expected one object a line"
            ) from error
        rows.append(_object(value, path, number, bool(_HALF.search(line))))
    return rows


def _json_list(text: str, path: Path) -> list[Row]:
    try:
        values = _parse_json(text, str(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many publish JSON lines under the name .json
            return _json_lines(text, path)
        raise DataError(f"{path} is not JSON ({error}); expected a list of objects") from error
    if not isinstance(values, list):
        raise DataError(f"{path} holds one {type(values).__name__}; expected a list of objects")
    half = bool(_HALF.search(text))
    return [_object(value, path, number, half) for number, value in enumerate(values, start=1)]


def _object(value: Any, path: Path, number: int, half: bool) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f'{path} row {number} is a {type(value).__name__}; expected an object such as {{"text":'
            " ...}"
        )
    if half:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            found = f"half of a character, \\u{ord(error.object[error.start]):04x}"
            raise DataError(
                f"{path} row {number} holds {found}; fix the text or remove the row"
            ) from error
    return value


def _table(text: str, usual: str, path: Path, columns: Sequence[str] | None) -> list[Row]:
    """The rows of a table with the usual separator, or with another where only that makes columns
    of every row.
    """
    width = len(columns) if columns else 0
    table = _fitting(text, usual, width)
    if table is None or len(table[0]) == 1:
        others = (_fitting(text, mark, width) for mark in _SEPARATORS if mark != usual)
        table = next((other for other in others if other is not None and len(other[0]) > 1), table)
    if table is None:
        table = _quoted(text, usual) or _plain(text, usual)
        bad = _ragged(table, width)
        assert bad is not None
        number = bad + (1 if columns else 0)
        found, expected = len(table[bad]), width or len(table[0])
        raise DataError(
            f"{path} row {number} has {found} columns, expected {expected}; fix that row"
        )

    names = list(columns) if columns else table.pop(0)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        hint = (
            "rename one"
            if columns
            else "rename one, or name the columns in data.columns if the first row is data"
        )
        raise DataError(f"{path} has the column {twice[0]!r} twice; {hint}")
    return [dict(zip(names, fields, strict=True)) for fields in table]


def _fitting(text: str, delimiter: str, width: int) -> list[list[str]] | None:
    """Fields with quotes (RFC 4180) or without (GLUE's tsv, where a quote is a character): the
    reading that fits every row.
    """
    quoted, plain = _quoted(text, delimiter), _plain(text, delimiter)
    # Two stray quotes can swallow the tsv lines between them and still leave whole rows.
    swallowed = (
        quoted is not None and delimiter == "\t" and len(quoted) < len(plain) and len(plain[0]) > 1
    )
    if (
        quoted is not None
        and _ragged(quoted, width) is None
        and not (swallowed and _ragged(plain, width) is None)
    ):
        return quoted
    return plain if _ragged(plain, width) is None else None


def _plain(text: str, delimiter: str) -> list[list[str]]:
    """The rows, where quotes are characters."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [line.split(delimiter) for line in lines if line]


def _quoted(text: str, delimiter: str) -> list[list[str]] | None:
    """The rows, where quotes enclose a field. None where the quotes do not balance."""
    # the default refuses a field above 128 KiB; a C long may be 32 bits
    csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return [row for row in reader if row]
    except csv.Error:
        return None


def _ragged(table: list[list[str]], width: int) -> int | None:
    """The index of the first row without `width` fields (0: as many as the first row), or None."""
    expected = width or len(table[0])
    return next((index for index, row in enumerate(table) if len(row) != expected), None)
