"""Refuses a process that a launcher started as one of several, since all would write one folder."""

from __future__ import annotations

from collections.abc import Mapping

from dlora.errors import ConfigError


def refuse_ranks(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if torchrun, mpirun or srun started several processes of one simulation.

    A Slurm batch script with several tasks that starts dlora only once is allowed.
    """
    for launcher, rank, size in (
        ("torchrun", "RANK", "WORLD_SIZE"),
        ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("srun", "SLURM_PROCID", "SLURM_NTASKS"),
    ):
        number, count = (environment.get(name, "") for name in (rank, size))
        if not (number.isdecimal() and count.isdecimal()) or int(count) < 2:
            continue
        if size == "SLURM_NTASKS" and int(number) == 0:
            continue  # the batch script itself
        raise ConfigError(
            f"{launcher} started {count} processes ({rank}={number}, {size}={count}), and dlora"
            " simulate is one that holds all peers: start it once, or remove these variables"
        )
