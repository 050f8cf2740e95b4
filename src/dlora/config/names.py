"""Which names a participant may have: each is also the name of a folder and of files."""

from __future__ import annotations

import re

# File systems allow 255 bytes in a name; a ledger's file names are longer than the peer's name.
_MAX_CHARACTERS, _MAX_BYTES = 80, 200


def safe_name(value: str) -> str:
    """`value` as the name of a folder: at most 80 letters, digits, dots, dashes and underscores.

    The result is "" if nothing is left.
    """
    name = re.sub(r"[^\w.-]+", "-", value).strip("-.")[:_MAX_CHARACTERS]
    return name.encode(errors="ignore")[:_MAX_BYTES].decode(errors="ignore").rstrip("-.")


def why_unsafe(names: list[str] | tuple[str, ...]) -> str | None:
    """Why the first unusable one of `names` cannot be the name of a folder; None if all can.

    Two names that differ only in upper and lower case are refused too.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not name or safe_name(name) != name:
            allowed = (
                f"letters, digits, dots, dashes and underscores, at most {_MAX_CHARACTERS}, letters"
                " or digits at the ends"
            )
            return f"{_shown(name)} cannot name a folder; use {allowed}"
        # some file systems do not distinguish upper and lower case
        if (other := seen.setdefault(name.casefold(), name)) != name:
            return f"{_shown(name)} and {_shown(other)} are the same as folder names; rename one"
    return None


def _shown(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:40]}...")
