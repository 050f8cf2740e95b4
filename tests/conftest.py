"""What the tests share: a small run's config, made of real parts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import settings

from dlora.config.run import Config
from kit import tiny_models

# a shell that starts the tests in the background had it ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
transformers.utils.logging.set_verbosity_error()  # new heads are expected here
transformers.utils.logging.disable_progress_bar()

# A slow machine is no failure, and a failure repeats.
settings.register_profile("dlora", deadline=None, derandomize=True)
settings.load_profile("dlora")


@pytest.fixture(autouse=True)
def no_session_outlives_its_test() -> Iterator[None]:
    """Of those over queues; a thread that waits inside a backward must not meet the end of the
    process.
    """
    yield
    if (queue_cloud := sys.modules.get("kit.queue_cloud")) is not None:
        queue_cloud.close_sessions()


@pytest.fixture
def disk_of_a_virtual_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it: a peer there dies between two writes, never of a power cut."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process write no report.html: its pictures take as long as a small run.

    Pages are tested in tests/show, tests/cli and with the real peers.
    """
    monkeypatch.setattr("dlora.run.account.write_report", lambda folder: None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(family, task) -> the folder of a tiny checkpoint, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, task: str = "classification") -> Path:
        if (family, task) not in made:
            made[family, task] = tiny_models.save_model(
                tmp_path_factory.mktemp(f"{family}-{task}"), family, task
            )
        return made[family, task]

    return make


@pytest.fixture
def make_config(tmp_path: Path, model_folder: Callable[[str, str], Path]) -> Callable[..., Config]:
    """``make_config(family, task, **{"train.rounds": 3})``: four peers on 64 rows; a path overrides
    any key.
    """

    def make(family: str = "bert", task: str = "classification", **overrides: Any) -> Config:
        tree: dict[str, Any] = {
            "model": str(model_folder(family, task)),
            "task": task,
            "device": "cpu",
            "lora": {"r": 4, "lora_alpha": 8},
            "data": {
                "train": str(tiny_models.write_rows(tmp_path / "train.jsonl", 64, task)),
                "eval": str(tiny_models.write_rows(tmp_path / "eval.jsonl", 16, task, start=64)),
                "max_length": 16,
            },
            "train": {
                "rounds": 3,
                "local_steps": 2,
                "per_device_train_batch_size": 4,
                "learning_rate": 5e-3,
            },
            "peers": {"count": 4},
            "output_dir": str(tmp_path / "run"),
        }
        for path, value in overrides.items():
            *parents, leaf = path.split(".")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[leaf] = value
        return Config.parse(tree)

    return make
