"""Whether the state of all participants fits into memory, and where it waits if it does not."""

from __future__ import annotations

import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

from dlora.config.run import Config
from dlora.errors import RunError
from dlora.lora.factors import Zeros, num_parameters, stack
from dlora.lora.mapped import mapped_zeros
from dlora.run.grouping import usable_memory
from dlora.run.prepare import Prepared
from dlora.show.words import bytes_text

# the part of the usable memory that the state of all participants may take
MOST = 1.0


def find_waiting(prepared: Prepared) -> Zeros | None:
    """What makes the state of the participants here: tensors in mapped files, if the state of all
    does not fit into memory; None: it fits. It is in files on Linux only, and never on a GPU.

    Warns of it. Raises RunError if the disk of the run's folder has too little room. All ranks call
    it together.
    """
    ranks, device = prepared.ranks, prepared.model.device
    here_bytes = _state_bytes(prepared)
    usable_bytes = usable_memory(prepared) / ranks.on_one_device(device)
    can_wait = device.type == "cpu" and sys.platform == "linux"
    if not ranks.any(can_wait and here_bytes > MOST * usable_bytes):
        return None
    path, all_bytes = Path(prepared.config.output_dir), sum(ranks.gathered(here_bytes))
    what = f"the state of {len(prepared.names):,} peers takes {bytes_text(all_bytes)}"

    def look() -> None:
        there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
        room = shutil.disk_usage(there).free
        if room < all_bytes:
            raise RunError(
                f"{what}, more than the memory that is free, and the disk of output_dir {path} has"
                f" {bytes_text(room)} left for it; free some, choose another disk with --set"
                " output_dir=..., or take fewer peers"
            )
        warnings.warn(
            f"{what}, and a process may use {bytes_text(usable_bytes)} of memory: it waits in files"
            f" in {path}, and rounds take longer (docs/runs.md)",
            stacklevel=4,
        )

    ranks.on_main(look)
    return partial(mapped_zeros, path)


def _state_bytes(prepared: Prepared) -> int:
    """What the participants here keep between their turns; a gradient is there in its turn only."""
    numbers = num_parameters(stack(prepared.model.initial, 1)) * len(prepared.here)
    return 4 * _kept(prepared.config) * numbers


def _kept(config: Config) -> int:
    """How many numbers are kept for each trained number."""
    kept = 3 if config.train.optimizer == "adamw" else 1  # with both moments
    if config.peers.overlap:
        kept += 1  # what is pending
    if config.schedule.kind != "all" and config.schedule.on_kill == "drop":
        kept += 2  # what is set aside, and a copy without it for the scores
    return kept
