"""A disk that is full, at the start or during a run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlora.run.folder import RunFolder
from kit.call_cli import assert_identical, call, contents, final_factors
from kit.refusals import assert_one_line, assert_refuses


class Disk:
    """A file system of its own, in memory, that can be full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, size_bytes: int) -> None:
        subprocess.run(
            ["mount", "-o", f"remount,size={size_bytes}", self.path],
            check=True,
            capture_output=True,
        )

    def fill(self) -> Path:
        filler = self.path / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return filler


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        # lazy: tensors may still map the files of a checkpoint
        subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_at_the_start_leaves_nothing(disk: Disk, work: Path) -> None:
    filler = disk.fill()
    before = contents(disk.path)
    arguments = ["simulate", "run.yaml", "--set", f"output_dir={disk.path}/runs/run"]
    assert_refuses([f"output_dir {disk.path}/runs/run cannot be made", "No space left"], *arguments)
    assert contents(disk.path) == before
    filler.unlink()
    disk.resize(50_000_000)
    assert call(*arguments).exit_code == 0


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("checkpoints", "saved"),
    [
        pytest.param(0.1, 0, marks=pytest.mark.slow),
        (0.5, 0),
        (1.1, 1),
        pytest.param(1.7, 1, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_during_the_run_keeps_the_last_checkpoint(
    disk: Disk, after_a_run: Path, checkpoints: float, saved: int
) -> None:
    """There is room for so many checkpoints; with space, --resume gives the factors of the run that
    always had it.
    """
    *_, checkpoint = sorted(Path("run/checkpoints/dec-lora").iterdir())
    size_bytes = sum(file.stat().st_size for file in checkpoint.iterdir())
    disk.resize(int(checkpoints * size_bytes) + 40_000)
    run = disk.path / "run"
    arguments = ["simulate", "run.yaml", "--set", f"output_dir={run}"]
    says = ["no space left on device", str(run), "free some", "--resume"]
    assert_one_line(call(*arguments), says)
    assert [path.name for path in run.glob("checkpoints/dec-lora/*")] == ["round-000001"] * saved
    stored = RunFolder(run).latest("dec-lora")
    assert (stored.rounds_done if stored else 0) == saved

    assert_one_line(call(*arguments, "--resume"), says)  # still full
    disk.resize(50_000_000)
    resumed = call(*arguments, "--resume")
    assert (resumed.exit_code, resumed.err) == (0, "")
    assert_identical(final_factors(run), final_factors(Path("run")))
    assert [str(path) for path in run.rglob(".*")] == []
