"""Whether a launcher started this process as one of several, and as which."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from dlora.errors import ConfigError


class Launched(NamedTuple):
    """One of ``size`` processes; ``local_size`` of them are on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched(environment: Mapping[str, str]) -> Launched | None:
    """Which process of several this is, as torchrun says; None: the only one.

    accelerate and a cluster's operators set the same variables. Raises ConfigError if mpirun or
    srun started several processes, which then know nothing of each other. A Slurm batch script with
    several tasks that starts dlora only once is allowed.
    """
    rank, size = _numbers(environment, "RANK", "WORLD_SIZE")
    if size >= 2:
        local_rank, local_size = _numbers(environment, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "MASTER_ADDR" not in environment or not local_size:
            raise ConfigError(
                f"RANK={rank} and WORLD_SIZE={size} say that this is one of {size} processes, but"
                " torchrun's other variables (MASTER_ADDR, LOCAL_RANK) are missing: start it with"
                f" torchrun --nproc-per-node {size} -m dlora, or remove these variables"
            )
        return Launched(rank, size, local_rank, local_size)
    for launcher, name, count in (
        ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("srun", "SLURM_PROCID", "SLURM_NTASKS"),
    ):
        rank, size = _numbers(environment, name, count)
        if size < 2 or (count == "SLURM_NTASKS" and rank == 0):  # 0: the batch script itself
            continue
        if "TORCHELASTIC_RUN_ID" in environment:  # one torchrun on each node
            continue
        raise ConfigError(
            f"{launcher} started {size} processes ({name}={rank}, {count}={size}) that know nothing"
            " of each other: let it start torchrun, and torchrun dlora (docs/cluster.md has the"
            " command), start dlora once, or remove these variables"
        )
    return None


def refuse_ranks(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if a launcher started several processes of a program that is only one."""
    if several := launched(environment):
        refused = ConfigError(
            f"torchrun started {several.size} processes (RANK={several.rank},"
            f" WORLD_SIZE={several.size}), and only dlora simulate and dlora peer train in"
            " several: start this once, or remove these variables"
        )
        if several.rank > 0:
            # torchrun ends all once one has failed, and rank 0 must have said why by then
            refused.told, refused.exit_code = True, 0
        raise refused


def restarts(environment: Mapping[str, str]) -> int:
    """How often torchrun has started the processes again, after one had failed
    (``--max-restarts``).
    """
    count = environment.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def launch_name(environment: Mapping[str, str]) -> str:
    """A name of this start of torchrun, which it keeps when it starts the processes again."""
    name = environment.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


def _numbers(environment: Mapping[str, str], rank: str, size: str) -> tuple[int, int]:
    """A rank and a number of ranks; zeros where the environment does not have both."""
    number, count = (environment.get(name, "") for name in (rank, size))
    return (int(number), int(count)) if number.isdecimal() and count.isdecimal() else (0, 0)
