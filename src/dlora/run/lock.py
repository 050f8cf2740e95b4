"""One process at a time in a run folder: which process uses it, and since when."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlora.errors import RunError
from dlora.events.timed import now

LOCK_FILE = "lock"  # in the run folder while a process uses it


@contextlib.contextmanager
def sole_use(path: Path) -> Iterator[None]:
    """Inside this context no other process uses the run folder ``path``.

    The folder is made if it is not there, and removed again if it stays empty. The kernel releases
    the lock when the process ends, in whatever way. Raises RunError, which names the other process,
    if the folder is in use, and if it cannot be made.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
    except OSError as error:
        remove_empty(made)
        raise cannot_make(path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _is_at(descriptor, path / LOCK_FILE):
                # remove the file before the lock is released, so that nobody locks a file that is
                # about to be removed
                os.unlink(path / LOCK_FILE)
        os.close(descriptor)
        remove_empty(made)


def check_unused(path: Path) -> None:
    """Raise RunError if another process uses the run folder ``path``. Makes nothing."""
    # the folder does not exist yet, or its name is not valid
    with contextlib.suppress(OSError, ValueError), open(path / LOCK_FILE, "rb") as file:
        _lock(file.fileno(), path)


def cannot_make(path: Path, cause: BaseException | None) -> RunError:
    """The error for an ``output_dir`` that cannot be made."""
    reason = getattr(cause, "strerror", None) or cause
    return RunError(
        f"output_dir {path} cannot be made ({reason}); fix that, or choose another with --set"
        " output_dir=..."
    )


def remove_empty(folders: list[Path]) -> None:
    """Remove these folders in the given order (innermost first); a folder that is not empty
    stays.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _locked(path: Path) -> int:
    """The descriptor of the folder's lock file, locked, with this process's name in it."""
    while True:
        descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(descriptor, path)
            # otherwise its last owner removed it between the two calls
            if _is_at(descriptor, path / LOCK_FILE):
                who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
                # on a full disk the lock works without the name of its owner
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(who).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(
            f"{path} is in use by {_owner(descriptor)}; wait until it has ended, or stop it"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        warnings.warn(
            f"{path} is on a file system without locks ({error.strerror}): see to it that one"
            " process uses it at a time",
            stacklevel=2,
        )


def _owner(descriptor: int) -> str:
    try:
        who: Any = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    # the owner has locked the file and not written its name yet
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there, here = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
