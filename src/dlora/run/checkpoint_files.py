"""The files of one checkpoint: each process writes the participants it holds, and reads any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from dlora.files import write_atomically
from dlora.lora.all_adapters import part_name
from dlora.lora.moments import leaf_rows
from dlora.run.sums import SUMS_FILE, Sum, check_sums, sums_text
from dlora.wire.tensors import pieces

FACTORS, OPTIMIZER, PENDING, STATE = "factors", "optimizer", "pending", "state.json"
RESULT_FILE = "result.json"
# keys of every checkpoint's state; each program adds its own
STATE_KEYS = {"bytes_on_wire", "seconds", "best", "environment"}


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on after ``rounds_done`` rounds.

    ``here``: the participants whose rows ``factors`` and ``pending`` have; None: all of the run.
    Data order and dropout follow from the round and the seed.
    """

    rounds_done: int
    factors: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # JSON: bytes_on_wire, seconds, best, log_position, environment
    result: dict[str, Any] | None = None  # the result, if the run is finished
    # with overlap: what the last round's mixing has still to add to the factors
    pending: dict[str, Tensor] = field(default_factory=dict)
    here: range | None = None


def write_part(folder: Path, checkpoint: Checkpoint, part: int, parts: int) -> str:
    """Write the tensors of a checkpoint as part number ``part``; returns lines of SHA256SUMS."""
    first = {"first": str(checkpoint.here.start)} if checkpoint.here and parts > 1 else None
    files = {
        FACTORS: pieces(checkpoint.factors, first),
        OPTIMIZER: pieces(checkpoint.optimizer),
    }
    if checkpoint.pending:
        files[PENDING] = pieces(checkpoint.pending, first)
    lines = ""
    for kind, content in files.items():
        name, summed = part_name(kind, part, parts), Sum(content)
        write_atomically(folder / name, summed)
        lines += summed.line(name)
    return lines


def write_state(folder: Path, state: Mapping[str, Any], sums: str) -> None:
    """Write what is no tensor, and the sums of all files; ``sums``: those of all parts."""
    content = json.dumps(state, indent=1).encode()
    write_atomically(folder / STATE, content)
    write_atomically(folder / SUMS_FILE, sums + sums_text({STATE: content}))


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a finished run beside its last checkpoint."""
    content = json.dumps(result)
    write_atomically(folder / RESULT_FILE, content)
    # dlora 0.1.0 wrote no sums; with sums, a result that has none does not count
    if (folder / SUMS_FILE).exists():
        sums = (folder / SUMS_FILE).read_text() + sums_text({RESULT_FILE: content.encode()})
        write_atomically(folder / SUMS_FILE, sums)


def read_checkpoint(folder: Path, here: range | None = None, check: bool = True) -> Checkpoint:
    """Read a checkpoint; of its tensors only what belongs to the participants ``here``; None: all.

    Raises OSError, ValueError or SafetensorError if the folder is not as it was saved. ``check``
    False: another process has looked at the sums.
    """
    names = [f"{FACTORS}.safetensors", f"{OPTIMIZER}.safetensors", STATE]
    if (folder / SUMS_FILE).exists():  # dlora 0.1.0 wrote no sums
        lines = (folder / SUMS_FILE).read_text().splitlines()
        names = check_sums(folder) if check else [line.partition("  ")[2] for line in lines]
    elif (folder / RESULT_FILE).exists():
        names.append(RESULT_FILE)

    def files(kind: str) -> list[Path]:
        return sorted(folder / name for name in names if name.startswith((f"{kind}.", f"{kind}-")))

    state = _read_object(folder / STATE, STATE_KEYS)
    result = None
    if RESULT_FILE in names:
        result = _read_object(folder / RESULT_FILE, {"result", "log_position"})
    if not files(FACTORS) or not files(OPTIMIZER):
        raise ValueError(f"{SUMS_FILE} names no factors")
    return Checkpoint(
        int(folder.stem.removeprefix("round-")),
        _read_rows(files(FACTORS), here),
        _read_moments(files(OPTIMIZER), here),
        state,
        result,
        _read_rows(files(PENDING), here),
        here,
    )


def _read_rows(files: list[Path], here: range | None) -> dict[str, Tensor]:
    """The rows of the participants ``here``, out of files that have consecutive ones."""
    found: dict[str, list[Tensor]] = {}
    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            first = int((file.metadata() or {}).get("first", "0"))
            for name in [*file.keys()]:
                rows = file.get_slice(name)
                start, stop = 0, rows.get_shape()[0]
                if here is not None:
                    start, stop = max(0, here.start - first), min(stop, here.stop - first)
                if start < stop:
                    found.setdefault(name, []).append(rows[start:stop])
    return {
        name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()
    }


def _read_moments(files: list[Path], here: range | None) -> dict[str, Tensor]:
    """The optimisers' tensors of the groups that have a participant of ``here``."""
    found: dict[str, Tensor] = {}
    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            names = [*file.keys()]
            counts: dict[str, int] = {}  # leaf -> its participants
            for name in names:
                leaf, shape = name.rpartition("/")[0], file.get_slice(name).get_shape()
                counts[leaf] = max(counts.get(leaf, 0), shape[0] if shape else 0)
            for name in names:
                leaf = name.rpartition("/")[0]
                group_first, _, of = leaf.partition("/")
                first = leaf_rows(of, int(group_first))[1]
                wanted = here is None or (first < here.stop and here.start < first + counts[leaf])
                if wanted:
                    found[name] = file.get_tensor(name)
    return found


def _read_object(path: Path, keys: set[str]) -> dict[str, Any]:
    """The JSON object in the file. Raises OSError or ValueError if it is none or lacks one of
    ``keys``.
    """
    read = json.loads(path.read_text())
    missing = keys - read.keys() if isinstance(read, dict) else keys
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(sorted(missing))}")
    return dict(read)
