"""A real peer in several processes: `dlora peer` under real torchrun, over TLS."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

import dlora
from kit.processes import NAMES, Federation, running, until
from kit.updates import UPDATE_BOUND, assert_same, update_of

pytestmark = pytest.mark.slow

RANKS = {"north": 2, "south": 3}  # east and west are one process each
KR = {"kind": "kr", "active_fraction": 0.4, "period": 3, "warmup_steps": 4}


def several(arguments: Sequence[str], out: Path, err: Path, ranks: int, *options: str) -> None:
    """What a forked process does: torchrun with ``ranks`` processes of `dlora ARGUMENTS`."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    torchrun = shutil.which("torchrun", path=Path(sys.executable).parent.as_posix())
    assert torchrun is not None
    started = [torchrun, "--standalone", "--nproc-per-node", str(ranks), *options, "-m", "dlora"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    os.execve(torchrun, [*started, *arguments], environment)


def start_all(peers: Federation, more: Sequence[str] = (), options: Sequence[str] = ()) -> None:
    """``more``: arguments of the sites of several processes; ``options``: those of torchrun."""
    for name in NAMES:
        if name in RANKS:
            peers.start_as(name, several, RANKS[name], *options, more=more)
        else:
            peers.start(name)


def assert_simulated(peers: Federation) -> None:
    """Law 5: each peer's factors and the average are those of the simulation."""
    config = peers.config
    dlora.simulate(config)
    for name in NAMES:
        for adapter in (f"peers/{name}", "consensus"):
            update, reference = (
                update_of(config, run / adapter)
                for run in (peers.run(name), Path(config.output_dir))
            )
            assert_same(update, reference, UPDATE_BOUND["adamw"], "classification")


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        (
            {"schedule": KR, "train.gradient_accumulation_steps": 2, "eval_peers_every": 2},
            [],
        ),
        ({"peers.overlap": True}, ["--set", "shard_model=true"]),
    ],
    ids=["kr", "overlap-divided"],
)
def test_sites_of_several_processes_end_where_their_simulation_ends(
    keys: dict[str, Any], more: list[str], tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    peers = Federation(tmp_path, model_folder("bert"), keys)
    with running(peers):
        start_all(peers, more)
        outcomes = peers.finish_all()
    for name, outcome in outcomes.items():
        assert outcome.exit_code == 0, (name, outcome.err)
        assert outcome.out.endswith(f"report: {peers.run(name)}/report.html\n")
    peers.assert_agreed()
    assert_simulated(peers)
    assert "ranks" not in peers.summary("west") and peers.summary("south")["ranks"] == 3
    alone, shared = (peers.summary(name)["runs"]["dec-lora"] for name in ("west", "south"))
    assert alone["consensus"] == pytest.approx(shared["consensus"], rel=1e-4)


def test_a_killed_process_of_a_site_costs_nothing(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """torchrun starts the whole site again, it goes on from its last checkpoint, and its neighbours
    have waited.
    """
    peers = Federation(tmp_path, model_folder("bert"), {"train.rounds": 40})
    with running(peers):
        start_all(peers, options=["--max-restarts", "1"])
        until(lambda: peers.rounds_done("south") > 3, "some rounds of south")
        [follower] = [
            child
            for child in psutil.Process(peers.processes["south"].pid).children(recursive=True)
            if child.environ().get("RANK") == "2"
        ]
        os.kill(follower.pid, signal.SIGKILL)
        outcomes = peers.finish_all()
    assert {outcome.exit_code for outcome in outcomes.values()} == {0}, outcomes["south"].err
    assert peers.events("south", "resumed")
    peers.assert_agreed()
    assert_simulated(peers)


def test_a_site_stops_as_one(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    """SIGTERM to torchrun: the round is saved, and with --resume the site ends as the others."""
    peers = Federation(tmp_path, model_folder("bert"), {"train.rounds": 40})
    with running(peers):
        start_all(peers)
        until(lambda: peers.rounds_done("north") > 3, "some rounds of north")
        peers.signal("north", signal.SIGTERM)
        stopped = peers.finish("north")
        assert "stopped" in stopped.err and "Traceback" not in stopped.err.partition("torch/")[0]
        assert peers.rounds_done("north") < 40
        peers.start_as("north", several, 2, more=["--resume"])
        outcomes = peers.finish_all()
    assert {outcome.exit_code for outcome in outcomes.values()} == {0}, outcomes["north"].err
    peers.assert_agreed()
    assert_simulated(peers)


def test_a_site_needs_a_row_for_each_process(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    peers = Federation(tmp_path, model_folder("bert"), {"train.per_device_train_batch_size": 2})
    with running(peers):
        peers.start_as("south", several, 3)
        outcome = peers.finish("south")
    assert outcome.exit_code == 1  # torchrun's own
    told = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert told == [
        "error: 3 ranks share train.per_device_train_batch_size 2, and each needs at least one row:"
        " start at most 2, or raise it"
    ]
    assert not peers.run("south").exists()
