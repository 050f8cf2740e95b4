"""Checksums beside files that are read again, in the format of `sha256sum --check`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

SUMS_FILE = "SHA256SUMS"


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
