"""Parquet, arrow files and folders of save_to_disk into rows."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dlora.errors import DataError

Row = dict[str, Any]

# A small file may stand for gigabytes: a column of one value is a few bytes. Real text shrinks to a
# tenth.
MOST_TIMES, FREE_BYTES = 100, 64 << 20
_FREE_ROWS = 2_000_000


def read_parquet(raw: bytes, path: Path) -> list[Row]:
    """Every row of a parquet file. Raises DataError where the file is no parquet, or would grow far
    beyond its size.
    """
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets, whose own reader keeps a second copy
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(raw))
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        _check_size(
            file.metadata.num_rows, sum(group.total_byte_size for group in groups), len(raw), path
        )
        return _rows(file.iter_batches(), len(raw), path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not parquet: {' '.join(str(error).split())[:300]}") from error


def read_arrow(raw: bytes, path: Path) -> list[Row]:
    """Every row of an arrow file, as a stream (what `datasets` writes) or with an index. Raises
    DataError as `read_parquet`.
    """
    import pyarrow
    import pyarrow.ipc  # type: ignore[import-untyped]

    try:
        if raw.startswith(b"ARROW1"):
            file = pyarrow.ipc.open_file(io.BytesIO(raw))
            return _rows(
                (file.get_batch(index) for index in range(file.num_record_batches)), len(raw), path
            )
        return _rows(pyarrow.ipc.open_stream(io.BytesIO(raw)), len(raw), path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is no arrow file: {' '.join(str(error).split())[:300]}") from error


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_saved(folder: Path, split: str | None, asked: str) -> list[Row]:
    """Every row of a folder that save_to_disk wrote; ``asked`` is how the user named it.

    Raises DataError: damaged, no such split, or several and none named.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises a dozen unrelated types
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{asked}: the data set in this folder cannot be loaded: {what}") from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = ", ".join(loaded)
        if split is None and len(loaded) == 1:
            split = next(iter(loaded))
        if split is None:  # guessing could train and score on the same rows
            raise DataError(
                f"{asked} has the splits {splits}; say which: {asked}:{next(iter(loaded), 'train')}"
            )
        if split not in loaded:
            raise DataError(f"{asked} has no split {split}; it has {splits}")
        loaded = loaded[split]
    elif split is not None:
        raise DataError(f"{asked} holds one data set, without splits; leave out :{split}")
    return list(loaded.with_format(None))


def _rows(batches: Iterable[Any], file_bytes: int, path: Path) -> list[Row]:
    rows: list[Row] = []
    num_rows = num_bytes = 0
    for batch in batches:
        num_rows, num_bytes = num_rows + batch.num_rows, num_bytes + batch.nbytes
        # what a file says of itself need not be so
        _check_size(num_rows, num_bytes, file_bytes, path)
        rows += batch.to_pylist()
    return rows


def _check_size(num_rows: int, num_bytes: int, file_bytes: int, path: Path) -> None:
    if num_bytes > max(FREE_BYTES, MOST_TIMES * file_bytes) or num_rows > max(
        _FREE_ROWS, file_bytes
    ):
        what = f"{num_rows:,} rows with {num_bytes / 1e6:,.0f} MB"
        raise DataError(
            f"{path} has {file_bytes / 1e6:.1f} MB and stands for at least {what}; that is no text"
            " to train on"
        )
