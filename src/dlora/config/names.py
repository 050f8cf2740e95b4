"""What may name a participant: it names a folder on every disk, and a file beside others."""

from __future__ import annotations

import re

# file systems take 255 bytes a name; files of a ledger add to it
_MAX_CHARACTERS, _MAX_BYTES = 80, 200


def safe_name(value: str) -> str:
    """`value` as the name of a folder: letters, digits, dot, dash, underscore, 80 of them at most;
    "" if none is left.
    """
    name = re.sub(r"[^\w.-]+", "-", value).strip("-.")[:_MAX_CHARACTERS]
    return name.encode(errors="ignore")[:_MAX_BYTES].decode(errors="ignore").rstrip("-.")


def why_unsafe(names: list[str] | tuple[str, ...]) -> str | None:
    """What is wrong with the first of `names` that cannot name a folder beside the others; None
    where all can.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not name or safe_name(name) != name:
            allowed = (
                f"letters, digits, dots, dashes and underscores, at most {_MAX_CHARACTERS}, letters"
                " or digits at the ends"
            )
            return f"{_shown(name)} cannot name a folder; use {allowed}"
        # some disks do not tell upper from lower case
        if (other := seen.setdefault(name.casefold(), name)) != name:
            return f"{_shown(name)} and {_shown(other)} are the same as folder names; rename one"
    return None


def _shown(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:40]}...")
