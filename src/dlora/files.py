"""Files that are whole or not there at all, and that outlive a power cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dlora.errors import RunError


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a whole file or nothing: under a temporary name beside it, synced, then renamed over
    it.

    Raises RunError when the disk is full or the place cannot be written; the old file is then
    untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> RunError:
    """The error that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"no space left on device while writing {path}; free some, then go on with --resume"
        )
    return RunError(
        f"{path} cannot be written ({error.strerror}); choose a place where you may write"
    )
