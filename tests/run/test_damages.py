"""Run folders that were damaged or are in use: whatever a run reads again is checked, and one line
says what to do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dlora.run.lock import LOCK_FILE, sole_use
from kit.call_cli import assert_identical, call, final_factors, furnish

pytestmark = pytest.mark.usefixtures("no_page")

LAST, BEFORE = (f"run/checkpoints/dec-lora/round-00000{number}" for number in (3, 2))
Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    """As a disk without space left leaves a file."""
    path.write_bytes(path.read_bytes()[:200])


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    """What safetensors makes of no tensors."""
    path.write_bytes((2).to_bytes(8, "little") + b"{}")


def says(text: str) -> Damage:
    return lambda path: path.write_text(text)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A folder with a finished run of three rounds; the tests damage copies."""
    folder = furnish(
        tmp_path_factory.mktemp("template") / "work", model_folder("bert"), {"eval_every": 0}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("simulate", "run.yaml").exit_code == 0
    return folder


@pytest.fixture
def after_a_run(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a copy of the template, with the finished run in run/."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "work"))
    return tmp_path / "work"


CHECKPOINT: dict[str, tuple[str, Damage]] = {
    "factors-cut": ("factors.safetensors", cut),
    "factors-flipped": ("factors.safetensors", flip),
    "factors-gone": ("factors.safetensors", Path.unlink),
    "optimizer-emptied": ("optimizer.safetensors", empty),
    "state-empty": ("state.json", says("{}")),
    "state-a-list": ("state.json", says("[]")),
    "state-cut": ("state.json", cut),
    "result-cut": ("result.json", lambda path: path.write_bytes(path.read_bytes()[:20])),
    "sums-cut": ("SHA256SUMS", lambda path: path.write_bytes(path.read_bytes()[:70])),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_damaged_checkpoint_is_passed_over(name: str, template: Path, after_a_run: Path) -> None:
    """Field cases 10 and 36: with a warning the run goes on from the checkpoint before, and ends
    where it would have.
    """
    file, damage = CHECKPOINT[name]
    damage(Path(LAST, file))
    outcome = call("simulate", "run.yaml", "--resume")
    assert outcome.exit_code == 0, outcome
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("warning: "), outcome.err
    assert (
        "round-000003 cannot be read" in outcome.err and "going back to round-000002" in outcome.err
    )
    assert_identical(final_factors(Path("run")), final_factors(template / "run"))
    assert call("simulate", "run.yaml", "--resume").err == "", "the damaged one is gone"


@pytest.mark.parametrize("text", ["{}", "[]"])
def test_a_state_without_sums_is_looked_at_too(text: str, after_a_run: Path) -> None:
    """Field case 36: a folder of dlora 0.1.0 has no sums; what every checkpoint must hold is asked
    for all the same.
    """
    for folder in (LAST, BEFORE):
        Path(folder, "SHA256SUMS").unlink()
        Path(folder, "state.json").write_text(text)
    outcome = call("simulate", "run.yaml", "--resume")
    assert (outcome.exit_code, outcome.err.count("\n")) == (2, 1), outcome
    assert "state.json lacks best, bytes_on_wire" in outcome.err


@pytest.mark.parametrize("text", ["[]", "{", "7"])
def test_a_damaged_manifest_is_one_line(text: str, after_a_run: Path) -> None:
    """Field case 36."""
    Path("run/manifest.json").write_text(text)
    outcome = call("simulate", "run.yaml", "--resume")
    assert (outcome.exit_code, outcome.err.count("\n")) == (
        2,
        1,
    ) and "run/manifest.json cannot be read" in outcome.err


def test_a_folder_has_one_process_at_a_time(after_a_run: Path) -> None:
    """Field case 34: the second is told which process has it; the lock goes with its process,
    however that ends.
    """
    before = (after_a_run / "run/log.jsonl").read_bytes()
    with sole_use(Path("run")):
        for arguments in (["--resume"], []):
            outcome = call("simulate", "run.yaml", *arguments)
            assert (outcome.exit_code, outcome.err.count("\n")) == (2, 1), outcome
            assert (
                f"run is in use by process {os.getpid()} on " in outcome.err
                and "since 20" in outcome.err
            )
    assert (after_a_run / "run/log.jsonl").read_bytes() == before and not Path(
        "run", LOCK_FILE
    ).exists()
    Path("run", LOCK_FILE).write_text(
        json.dumps({"pid": 1, "host": "a process that was killed", "since": "2026"})
    )
    assert call("simulate", "run.yaml", "--resume").exit_code == 0


HOLDS = """
import signal
from pathlib import Path
from dlora.run.lock import sole_use
with sole_use(Path("run")):
    print("has it", flush=True)
    signal.pause()
"""


def test_a_killed_process_leaves_no_lock(after_a_run: Path) -> None:
    """Field case 34: kill -9 gives the folder back, though the file is still there."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS], cwd=after_a_run, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "has it\n"
        outcome = call("simulate", "run.yaml", "--resume")
        assert (
            outcome.exit_code == 2 and f"run is in use by process {holder.pid} on " in outcome.err
        )
        holder.kill()
    assert Path("run", LOCK_FILE).exists()
    with sole_use(Path("run")):
        pass
    assert not Path("run", LOCK_FILE).exists()
