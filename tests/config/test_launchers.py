"""Processes that a launcher started as one of several."""

from __future__ import annotations

import pytest

from dlora.config.launchers import refuse_ranks
from dlora.errors import ConfigError
from kit.call_cli import call

MANY = [
    ("torchrun", {"RANK": "0", "WORLD_SIZE": "2"}),
    ("torchrun", {"RANK": "1", "WORLD_SIZE": "2"}),
    ("mpirun", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}),
    ("srun", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}),
    ("srun", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}),
]
ONE: list[dict[str, str]] = [
    {},
    {"RANK": "0", "WORLD_SIZE": "1"},
    {"WORLD_SIZE": "2"},
    {"RANK": "first", "WORLD_SIZE": "many"},
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script that starts dlora itself
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},
]


@pytest.mark.parametrize(("launcher", "environment"), MANY)
def test_several_ranks_are_refused(launcher: str, environment: dict[str, str]) -> None:
    """Field case 27: two ranks would write one folder."""
    with pytest.raises(ConfigError, match=f"^{launcher} started . processes .*start it once"):
        refuse_ranks(environment)


@pytest.mark.parametrize("environment", ONE)
def test_one_process_is_none_of_several(environment: dict[str, str]) -> None:
    """Field case 27."""
    refuse_ranks(environment)


def test_the_command_asks_before_it_reads(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field case 27: exit 2, one line, nothing written."""
    monkeypatch.chdir(str(tmp_path))
    with open("run.yaml", "w") as file:
        file.write("model: none\ndata: {train: a.jsonl, eval: b.jsonl}\n")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = call("simulate", "run.yaml")
    assert outcome.exit_code == 2 and outcome.err.startswith(
        "error: torchrun started 2 processes (RANK=1, WORLD_SIZE=2)"
    )
