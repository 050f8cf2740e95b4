"""The factors of all peers of a run in one file; a run of many peers has no folder for each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
from safetensors.torch import save
from torch import Tensor

from dlora.errors import RunError
from dlora.files import write_atomically
from dlora.lora.factors import Factors


def save_all(path: Path, factors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write the factors of all peers, (P, ...) each; ``names``: of the peers, in order.

    Raises RunError when the file cannot be written.
    """
    content = {name: tensor.detach().float().cpu().contiguous() for name, tensor in factors.items()}
    try:
        write_atomically(path, save(content, metadata={"peers": json.dumps([*names])}))
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}); fix that, then go on with --resume"
        ) from error


def load_one(path: Path, peer: str) -> Factors:
    """Read the factors of one peer, (1, ...) each, and nothing else.

    Raises RunError when the file cannot be read or does not hold the peer.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = json.loads((file.metadata() or {}).get("peers", "[]"))
            if peer not in names:
                raise RunError(
                    f"{path} holds no peer {peer}; it holds {', '.join(names[:3])}"
                    f"{', ...' if len(names) > 3 else ''} ({len(names)} peers)"
                )
            row = names.index(peer)
            return {name: file.get_slice(name)[row : row + 1] for name in [*file.keys()]}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}); give the folder of a run") from error
