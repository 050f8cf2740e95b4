"""Real peers whose folder is an older copy, whose key runs twice, or whose newest checkpoint is
damaged.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.processes import LIMIT_S, Federation, run_dlora, running, until

pytestmark = pytest.mark.slow
NAMES = ("north", "east", "south")


def members(folder: Path, model: Path, silence_s: float) -> Federation:
    changes = {
        "train.rounds": 14, "train.local_steps": 8, "train.learning_rate": 5e-4,
        "peers.silence_s": silence_s, "eval_every": 0,
    }  # fmt: skip
    return Federation(folder, model, changes, names=NAMES, dial_only=["south"])


def copied(peers: Federation, name: str, to: Path) -> Path:
    """A copy of a folder as it is between two moments."""
    peers.signal(name, signal.SIGSTOP)
    until(lambda: peers.is_stopped(name), f"{name} to stop")
    shutil.copytree(peers.run(name), to)
    peers.signal(name, signal.SIGCONT)
    return to


def after(peers: Federation, name: str, rounds: int) -> None:
    until(lambda: peers.rounds_done(name) >= rounds, f"{name} to have done {rounds} rounds")


def test_a_folder_that_is_copied_back_from_a_backup(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """Field case 42: the peer ends with exit code 2 and one line; the others end well."""
    peers = members(tmp_path, model_folder("bert"), 3.0)
    with running(peers):
        peers.start_all()
        after(peers, "south", 2)
        backup = copied(peers, "south", tmp_path / "backup")
        after(peers, "south", peers.rounds_done("south") + 3)
        peers.kill("south")
        shutil.rmtree(peers.run("south"))
        shutil.copytree(backup, peers.run("south"))
        peers.start("south", "--resume")
        outcome = peers.finish("south")
        assert (outcome.exit_code, outcome.err.count("\n")) == (2, 1), outcome
        assert (
            f"{peers.run('south')} is an older copy, or the key of south is used on another"
            " machine too" in outcome.err
        )
        assert (
            "has south's signature for round " in outcome.err
            and "restore the newest copy" in outcome.err
        )
        others = {name: peers.finish(name) for name in ("north", "east")}
    assert {outcome.exit_code for outcome in others.values()} == {0}, others
    assert any(peers.events(name, "lacks") for name in others)
    assert (peers.run("south") / "checkpoints").exists(), "what was saved stays"


def test_one_key_on_two_machines(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    """Field case 42: of a folder and its copy, both in use, the one that is behind ends."""
    peers = members(tmp_path, model_folder("bert"), 10.0)
    with running(peers):
        peers.start_all()
        after(peers, "south", 2)
        other = copied(peers, "south", tmp_path / "machine")
        after(peers, "south", peers.rounds_done("south") + 3)
        first = peers.processes["south"]
        peers.start_as("south", run_dlora, more=["--resume", "--set", f"output_dir={other}"])
        outcome = peers.finish("south")
        peers.processes["south"] = first
        assert (outcome.exit_code, outcome.err.count("\n")) == (2, 1), outcome
        assert (
            f"{other} is an older copy, or the key of south is used on another machine too"
            in outcome.err
        )
        first.join(LIMIT_S)
        assert first.exitcode == 0
        assert {peers.finish(name).exit_code for name in ("north", "east")} == {0}


def test_back_to_the_checkpoint_before(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    """Field case 36: the newest checkpoint is damaged; the ledger is whole, so nothing is called a
    lack and all agree.
    """
    peers = members(tmp_path, model_folder("bert"), 60.0)
    with running(peers):
        peers.start_all()
        after(peers, "south", 4)
        peers.kill("south")
        *_, newest = sorted((peers.run("south") / "checkpoints" / "dec-lora").glob("round-*"))
        content = bytearray((newest / "factors.safetensors").read_bytes())
        content[-5] ^= 1
        (newest / "factors.safetensors").write_bytes(content)
        peers.start("south", "--resume")
        outcomes = peers.finish_all()
    assert {outcome.exit_code for outcome in outcomes.values()} == {0}, outcomes
    assert "going back to round-" in outcomes["south"].err
    assert not any(peers.events(name, "lacks") for name in NAMES)
    peers.assert_agreed()
