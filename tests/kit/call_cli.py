"""The command line as the tests call it: in this process for speed, or as the process that a user
starts.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dlora import cli
from kit import tiny_models


class Outcome(NamedTuple):
    """What a command left on the terminal; ``err`` is standard error without the lines that tell
    how far it is.
    """

    exit_code: int
    out: str
    err: str


def call(*arguments: str | Path) -> Outcome:
    """``dlora arguments...`` in this process; standard output and standard error are no
    terminals.
    """
    out, err, exit_code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["dlora", *map(str, arguments)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own
        try:
            cli.main()
        except SystemExit as leaving:
            exit_code = leaving.code if isinstance(leaving.code, int) else 1
    return Outcome(exit_code, out.getvalue(), without_news(err.getvalue()))


def without_news(err: str) -> str:
    """Standard error without the lines of `Progress`, which begin with the time of day."""
    return re.sub(r"(?m)^\d\d:\d\d:\d\d .*\n", "", err)


def start(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """``dlora arguments...`` as a process of its own, in ``folder``, with as many threads as this
    one has.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "dlora.cli", *map(str, arguments)],
        cwd=folder,
        # with Python's buffers, as at a user's, whatever is set here
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "HF_HUB_OFFLINE": "1",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a process and read what it printed."""
    out, err = process.communicate(timeout=100)
    return Outcome(process.returncode, out, without_news(err))


def furnish(folder: Path, model: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Put a small run that works into ``folder``: model/, train.jsonl, eval.jsonl, run.yaml; all
    paths are relative.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model, folder / "model")
    tiny_models.write_rows(folder / "train.jsonl", 64)
    tiny_models.write_rows(folder / "eval.jsonl", 16, start=64)
    tree: dict[str, Any] = {
        "model": "model",
        "device": "cpu",
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 16},
        "train": {
            "rounds": 3,
            "local_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
        },
        "peers": {"count": 4},
        "save_every": 1,
        "output_dir": "run",
    }
    change(tree, changes or {})
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder


def change(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set every key that ``changes`` names by its path, such as ``train.rounds``."""
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below ``folder`` with its bytes (None for a folder): what must be unchanged when a
    command refuses.
    """
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def final_factors(run: Path, name: str = "dec-lora") -> dict[str, torch.Tensor]:
    """The stacked factors of the last of the two checkpoints that a finished run keeps."""
    *_, folder = sorted((run / "checkpoints" / name).iterdir())
    return {
        key: tensor.clone() for key, tensor in load_file(folder / "factors.safetensors").items()
    }


def assert_identical(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    """The same names and, to the last bit, the same numbers."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
