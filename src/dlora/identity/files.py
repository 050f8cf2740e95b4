"""How files of identities are read and made: bounded, and keys for their owner's eyes only."""

from __future__ import annotations

import os
from pathlib import Path

from dlora.errors import IdentityError

MAX_FILE_BYTES = 1 << 20  # of a key, member or federation file; a member takes about 1 KB


def read_text(path: Path) -> str:
    """The text of a key, member or federation file, ``MAX_FILE_BYTES`` at most. Raises
    IdentityError.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise IdentityError(
                f"{path} has more than {MAX_FILE_BYTES:,} bytes: not a key, member or federation"
                " file"
            )
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = (
            error.strerror
            if isinstance(error, OSError)
            else f"not text at byte {error.start}, where PEM or YAML is"
        )
        raise IdentityError(
            f"{path} cannot be read ({reason}); give the path of a text file that you may read"
        ) from error


def create_file(path: Path, text: str, mode: int) -> None:
    """Make a file that did not exist, with its mode from the first byte on. A file that could not
    be written whole is removed.
    """
    created = False
    try:
        with open(
            path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)
        ) as file:
            created = True
            file.write(text)
    except FileExistsError:
        raise IdentityError(
            f"{path} exists and is never overwritten; to renew an identity, give another --folder"
        ) from None
    except OSError as error:
        if created:
            path.unlink()
        raise IdentityError(
            f"{path} cannot be written ({error.strerror}); choose a folder where you may write"
        ) from error
