"""Writes files so that each is complete or absent, also after a power cut."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from dlora.errors import RunError


def write_atomically(path: str | Path, content: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Write a complete file or nothing; ``content`` in one piece or in several.

    The content is written to a temporary file in the same folder and synced, then that file is
    renamed. Raises RunError when the disk is full or the path cannot be written; the old file is
    then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            content = content.encode() if isinstance(content, str) else content
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> RunError:
    """A RunError that says why ``path`` cannot be written and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"no space left on device while writing {path}; free some, then go on with --resume"
        )
    return RunError(
        f"{path} cannot be written ({error.strerror}); choose a place where you may write"
    )
