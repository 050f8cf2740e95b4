"""Processes that a launcher started as one of several."""

from __future__ import annotations

import pytest

from dlora.config.launchers import Launched, launched, refuse_ranks, restarts
from dlora.errors import ConfigError
from kit.call_cli import call

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
}
MANY = [
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
    # srun starts one torchrun on each of two nodes, and each starts one process
    {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "TORCHELASTIC_RUN_ID": "7"},
]


@pytest.mark.parametrize(("launcher", "environment"), MANY)
def test_processes_that_know_nothing_of_each_other_are_refused(
    launcher: str, environment: dict[str, str]
) -> None:
    """Field case 27: two ranks would write one folder."""
    for program in (launched, refuse_ranks):
        with pytest.raises(
            ConfigError, match=f"^{launcher} started . processes .*start dlora once"
        ):
            program(environment)


def test_half_of_torchruns_variables_are_refused() -> None:
    with pytest.raises(ConfigError, match="^RANK=0 and WORLD_SIZE=2 say .*torchrun --nproc-per-n"):
        launched({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("environment", ONE)
def test_one_process_is_none_of_several(environment: dict[str, str]) -> None:
    """Field case 27."""
    assert launched(environment) is None
    refuse_ranks(environment)


def test_torchrun_starts_a_simulation_and_no_peer() -> None:
    assert launched(TORCHRUN) == Launched(rank=1, size=2, local_rank=1, local_size=2)
    with pytest.raises(ConfigError, match="^torchrun started 2 processes .*start this once"):
        refuse_ranks(TORCHRUN)
    assert [restarts({"TORCHELASTIC_RESTART_COUNT": count}) for count in ("0", "2")] == [0, 2]
    assert restarts({}) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_plans_nothing_and_says_so_once(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (TORCHRUN | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).items():
        monkeypatch.setenv(key, value)
    for command in (["plan", "run.yaml"], ["topology", "ring"], ["config"]):
        outcome = call(*command)
        assert outcome.out == ""
        if rank == 0:
            assert outcome.exit_code == 2 and outcome.err.count("\n") == 1
            assert outcome.err.startswith("error: torchrun started 2 processes (RANK=0")
        else:  # a failure of this rank would end rank 0 before it has said why
            assert (outcome.exit_code, outcome.err) == (0, "")


def test_the_command_asks_before_it_reads(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field case 27: exit 2, one line, nothing written."""
    monkeypatch.chdir(str(tmp_path))
    with open("run.yaml", "w") as file:
        file.write("model: none\ndata: {train: a.jsonl, eval: b.jsonl}\n")
    for key, value in MANY[0][1].items():
        monkeypatch.setenv(key, value)
    outcome = call("simulate", "run.yaml")
    assert outcome.exit_code == 2 and outcome.err.startswith("error: mpirun started 4 processes")
