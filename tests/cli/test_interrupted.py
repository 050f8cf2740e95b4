"""Runs that are interrupted or killed, in processes of their own: they go on bit for bit."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dlora.events.log import read_log
from kit.call_cli import (
    Outcome,
    assert_identical,
    call,
    final_factors,
    finish,
    furnish,
    start,
    without_news,
)

# time to interrupt one
LONG_ROUNDS = {"train.rounds": 4, "train.local_steps": 12, "peers.count": 2, "save_every": 2}
CLOCKS = {"seconds", "spent_s", "participant_steps_per_second", "tokens_per_second"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A folder with a run of a few long rounds that nobody interrupted."""
    folder = furnish(tmp_path_factory.mktemp("long") / "work", model_folder("bert"), LONG_ROUNDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("simulate", "run.yaml").exit_code == 0
    return folder


@pytest.fixture
def fresh(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder has the same config and data, and no run."""
    folder = shutil.copytree(whole, tmp_path / "work", ignore=shutil.ignore_patterns("run"))
    monkeypatch.chdir(folder)
    return folder


def wait_for_round(process: subprocess.Popen[str], run: Path, number: int) -> None:
    """Until the log of ``run`` holds that round; fails when the process ends before it."""
    deadline = time.monotonic() + 100
    while number not in rounds_logged(run):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.005)


def rounds_logged(run: Path) -> list[int]:
    log = run / "log.jsonl"
    return (
        [event["round"] for event in read_log(log) if event["event"] == "round"]
        if log.exists()
        else []
    )


def assert_as_if_uninterrupted(run: Path, whole: Path) -> None:
    """Factors bit for bit, the summary but for its clocks, and every round once in the log."""
    assert_identical(final_factors(run), final_factors(whole / "run"))
    results = [
        json.loads((folder / "summary.json").read_text())["runs"]["dec-lora"]
        for folder in (run, whole / "run")
    ]
    ours, theirs = (
        {key: value for key, value in result.items() if key not in CLOCKS} for result in results
    )
    assert ours == theirs
    assert rounds_logged(run) == [0, 1, 2, 3]


def resume(message: str) -> None:
    """Do what the message says."""
    _, _, command = message.rpartition("go on with: ")
    name, *arguments = shlex.split(command)
    assert name == "dlora"
    outcome = call(*arguments)
    assert (outcome.exit_code, outcome.err) == (0, "")


def test_ctrl_c_finishes_the_round_and_says_how_to_go_on(fresh: Path, whole: Path) -> None:
    process = start(fresh, "simulate", "run.yaml", "--set", "output_dir=my run")
    wait_for_round(process, fresh / "my run", 0)
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert (outcome.exit_code, outcome.out) == (4, "")
    # and nothing else: no bars where there is no terminal
    announcement, message = outcome.err.splitlines()
    assert announcement == "stopping after this round; Ctrl-C again discards it"
    stopped = re.match(
        r"dec-lora stopped after round (\d) of 4, finished and saved; go on with: ", message
    )
    assert stopped is not None, message
    *_, checkpoint = sorted(Path("my run/checkpoints/dec-lora").iterdir())
    assert checkpoint.name == f"round-00000{stopped[1]}"
    resume(message)
    assert_as_if_uninterrupted(Path("my run"), whole)


@pytest.mark.slow
def test_ctrl_c_twice_discards_the_round(fresh: Path, whole: Path) -> None:
    process = start(fresh, "simulate", "run.yaml")
    wait_for_round(process, fresh / "run", 1)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    said = next(line for line in process.stderr if without_news(line))
    assert said == "stopping after this round; Ctrl-C again discards it\n"
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert (outcome.exit_code, outcome.out) == (4, "")
    [message] = outcome.err.splitlines()
    assert message.startswith(
        "the round under way is discarded, what was saved stands; go on with: dlora simulate "
    )
    resume(message)
    assert_as_if_uninterrupted(Path("run"), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=["Ctrl-C", "SIGUSR1"])
def test_a_signal_while_loading_ends_at_once_and_the_same_command_starts_anew(
    number: signal.Signals, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """Field case 15: nothing is written yet, and libraries that are being imported cannot swallow
    the signal.
    """
    folder = furnish(tmp_path / "work", model_folder("bert"))
    process = start(folder, "simulate", "run.yaml")
    assert process.stderr is not None
    assert "starting" in process.stderr.readline()
    process.send_signal(number)
    outcome = finish(process)
    assert (outcome.exit_code, outcome.out) == (4, "")
    assert (
        outcome.err
        == "stopped before it began; nothing was written; start it again with: dlora simulate"
        " run.yaml\n"
    )
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_sigusr1_is_heard_as_sigterm_is(fresh: Path, whole: Path) -> None:
    """Field case 15: Slurm sends it before a job's end."""
    process = start(fresh, "simulate", "run.yaml")
    wait_for_round(process, fresh / "run", 0)
    process.send_signal(signal.SIGUSR1)
    outcome = finish(process)
    assert (
        outcome.exit_code == 4
        and "finished and saved; go on with: dlora simulate run.yaml --resume" in outcome.err
    )
    resume(outcome.err)
    assert_as_if_uninterrupted(Path("run"), whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(fresh: Path, whole: Path) -> None:
    process = start(fresh, "simulate", "run.yaml")
    wait_for_round(process, fresh / "run", 2)
    process.kill()
    assert finish(process) == Outcome(-signal.SIGKILL, "", "")
    # round 2 is lost
    assert [path.name for path in Path("run/checkpoints/dec-lora").iterdir()] == ["round-000002"]
    outcome = call("simulate", "run.yaml", "--resume")
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert_as_if_uninterrupted(Path("run"), whole)
