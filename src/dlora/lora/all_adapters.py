"""The factors of all peers of a run in one file, or in one for each process of the run; a run of
many peers has no folder for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
from torch import Tensor

from dlora.errors import RunError
from dlora.files import write_atomically
from dlora.lora.factors import Factors
from dlora.wire.tensors import pieces


def save_all(path: Path, factors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write the factors of all peers, (P, ...) each; ``names``: of the peers, in order.

    Raises RunError when the file cannot be written.
    """
    try:
        write_atomically(path, pieces(factors, {"peers": json.dumps([*names])}))
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}); fix that, then go on with --resume"
        ) from error


def load_one(files: Sequence[Path], peer: str) -> Factors:
    """Read the factors of one peer, (1, ...) each, and nothing else.

    Raises RunError when a file cannot be read or none holds the peer.
    """
    known: list[str] = []
    for path in files:
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = json.loads((file.metadata() or {}).get("peers", "[]"))
                if peer in names:
                    row = names.index(peer)
                    return {name: file.get_slice(name)[row : row + 1] for name in [*file.keys()]}
                known += names
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise RunError(f"{path} cannot be read ({error}); give the folder of a run") from error
    raise RunError(
        f"{files[0].parent} holds no peer {peer}; it holds {', '.join(known[:3])}"
        f"{', ...' if len(known) > 3 else ''} ({len(known)} peers)"
    )


def part_name(kind: str, part: int, parts: int) -> str:
    """The name of the file that part number ``part`` (from 0) of ``parts`` is in; model hubs name
    the parts of a model so.
    """
    which = f"-{part + 1:05d}-of-{parts:05d}" if parts > 1 else ""
    return f"{kind}{which}.safetensors"


def part_files(folder: Path, kind: str) -> list[Path]:
    """The files of that kind in ``folder``, in order of their parts."""
    return sorted([*folder.glob(f"{kind}.safetensors"), *folder.glob(f"{kind}-*-of-*.safetensors")])
