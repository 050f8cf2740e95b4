"""Checksums beside files that are read again, in the format of `sha256sum --check`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SUMS_FILE = "SHA256SUMS"


class Sum:
    """The sum of a file, made while its ``pieces`` pass."""

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces, self._sha256 = pieces, hashlib.sha256()

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for piece in self._pieces:
            self._sha256.update(piece)
            yield piece

    def line(self, name: str) -> str:
        """The SHA-256 in hex, two blanks, the file's name."""
        return f"{self._sha256.hexdigest()}  {name}\n"


def sums_text(files: Mapping[str, bytes]) -> str:
    """One line for each file: its SHA-256 in hex, two blanks, its name."""
    return "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()
    )


def check_sums(folder: Path) -> list[str]:
    """The names in the folder's SHA256SUMS.

    Raises ValueError or OSError if a file is not what was saved.
    """
    names = []
    for line in (folder / SUMS_FILE).read_text().splitlines():
        sha256, _, name = line.partition("  ")
        if not name or Path(name).name != name:
            raise ValueError(f"{SUMS_FILE} is damaged")
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ValueError(f"{name} is not what was saved")
        names.append(name)
    return names
