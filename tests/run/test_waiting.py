"""State that does not fit into memory waits in mapped files; the run ends with the same bits."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

import dlora
from dlora.config.run import Config
from dlora.errors import Interrupted, RunError
from dlora.lora.mapped import mapped_zeros
from dlora.programs.simulate import dry_run
from dlora.run import grouping, waiting
from dlora.run.free_memory import free_memory
from dlora.run.prepare import prepare
from dlora.wire.tensors import pieces
from kit.run_folders import assert_identical, factors_of, optimizer_of, stop_after, story

pytestmark = pytest.mark.usefixtures("no_page")

KR = {"kind": "kr", "active_fraction": 0.35, "warmup_steps": 2, "period": 2, "rewarm_steps": 2}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors that were made in files."""
    found: list[torch.Tensor] = []

    def noted(folder: Path, shape: tuple[int, ...]) -> torch.Tensor:
        found.append(mapped_zeros(folder, shape))
        return found[-1]

    monkeypatch.setattr(waiting, "mapped_zeros", noted)
    return found


def ended(config: Config, stops: int | None = None) -> tuple[Any, ...]:
    """Run it, stopped and resumed after ``stops`` rounds; all that it left."""
    if stops is not None:
        with pytest.raises(Interrupted):
            dlora.simulate(config, stop=stop_after(stops))
    dlora.simulate(config, resume=stops is not None)
    arms = ("dec-lora", *config.compare)
    states = [of(config, arm) for arm in arms for of in (factors_of, optimizer_of)]
    return story(config), *states


@pytest.mark.parametrize(
    ("keys", "stops"),
    [
        ({}, None),
        ({"compare": ["pooled", "local"]}, 4),
        ({"peers.participation": 0.5, "peers.topology": {"kind": "complete"}}, 2),
        ({"schedule": KR | {"on_kill": "drop"}}, 2),
        ({"peers.overlap": True, "peers.wire": "bfloat16"}, 2),
        ({"train.optimizer_state": "reset", "peers.rule": "alternate"}, 2),
        ({"train.optimizer": "sgd", "train.learning_rate": 0.1}, None),
    ],
)
def test_a_run_in_files_ends_with_the_bits_of_one_in_memory(
    make_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: list[torch.Tensor],
    keys: dict[str, Any],
    stops: int | None,
) -> None:
    common = {"peers.group_size": 3, **keys}
    in_memory = ended(make_config(**common, output_dir=str(tmp_path / "memory")), stops)
    assert made == []
    monkeypatch.setattr(waiting, "MOST", 0.0)
    config = make_config(**common, output_dir=str(tmp_path / "files"))
    with pytest.warns(UserWarning, match=r"state of 4 peers takes .* it waits in files in"):
        in_files = ended(config, stops)
    assert made != []
    assert in_memory[0] == in_files[0]
    for one, other in zip(in_memory[1:], in_files[1:], strict=True):
        assert_identical(one, other)
    names = {path.name for path in Path(config.output_dir).iterdir()}
    assert names == {path.name for path in Path(tmp_path, "memory").iterdir()}


def test_a_run_goes_on_in_memory_and_in_files(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ended(make_config(output_dir=str(tmp_path / "plain")))
    config = make_config(output_dir=str(tmp_path / "both"))
    for most, stop in ((0.0, stop_after(1)), (1.0, stop_after(1))):
        monkeypatch.setattr(waiting, "MOST", most)
        with (
            pytest.raises(Interrupted),
            pytest.warns(UserWarning, match="it waits") if most == 0 else nullcontext(),
        ):
            dlora.simulate(config, stop=stop, resume=most == 1.0)
    monkeypatch.setattr(waiting, "MOST", 0.0)
    with pytest.warns(UserWarning, match="it waits"):
        dlora.simulate(config, resume=True)
    assert_identical(plain[1], factors_of(config))
    assert_identical(plain[2], optimizer_of(config))


def test_factors_and_both_moments_are_in_files_and_no_file_is_seen(
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    made: list[torch.Tensor],
) -> None:
    monkeypatch.setattr(waiting, "MOST", 0.0)
    config, seen = make_config(), []

    def stop() -> bool:
        """After each round."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        seen.append(
            (
                sum(config.output_dir in line and line.endswith("(deleted)") for line in lines),
                {path.name for path in Path(config.output_dir).iterdir()},
            )
        )
        return False

    with pytest.warns(UserWarning, match="it waits"):
        dlora.simulate(config, stop=stop)
    names = len(prepare(config).trained)
    assert len(made) == 3 * names
    for maps, files in seen:
        assert maps == 3 * names
        assert files | {"checkpoints"} == {
            "checkpoints",
            "config.yaml",
            "lock",
            "log.jsonl",
            "manifest.json",
        }


def test_too_little_disk_is_told_before_anything_is_written(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "MOST", 0.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    config = make_config()
    for run in (dlora.simulate, dry_run):
        with pytest.raises(RunError, match=r"4 peers takes .* has 1.0.kB left for it"):
            run(config)
    assert not Path(config.output_dir).exists()


def test_a_disk_that_is_full_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, num_bytes: int) -> None:
        assert (start, num_bytes) == (0, 24)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert torch.equal(mapped_zeros(tmp_path, (2, 3)), torch.zeros(2, 3))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match="no space left on device"):
        mapped_zeros(tmp_path, (2, 3))
    assert [*tmp_path.iterdir()] == []


def test_state_waits_when_it_takes_more_than_a_process_may_use(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW keeps three float32 numbers for each that trains, SGD one, overlap one more."""
    for keys, kept in (
        ({}, 3),
        ({"train.optimizer": "sgd"}, 1),
        ({"peers.overlap": True}, 4),
        ({"schedule": KR}, 3),
        ({"schedule": KR | {"on_kill": "drop"}}, 5),
    ):
        prepared = prepare(make_config(**keys))
        numbers = sum(tensor.numel() for tensor in prepared.model.initial.values())
        state = 4 * kept * 4 * numbers
        monkeypatch.setattr(waiting, "usable_memory", lambda prepared, state=state: state)
        assert waiting.find_waiting(prepared) is None
        monkeypatch.setattr(waiting, "usable_memory", lambda prepared, state=state: state - 1)
        with pytest.warns(UserWarning, match="it waits"):
            assert waiting.find_waiting(prepared) is not None


def test_as_many_train_at_once_as_their_own_state_leaves_room_for(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(make_config(**{"peers.count": 8}))
    numbers = sum(tensor.numel() for tensor in prepared.model.initial.values())
    activations = grouping.bytes_of_activations(prepared)
    for waits, usable, size in (
        (True, 3 * (16 * numbers + activations), 3),
        (False, 8 * 12 * numbers + 5 * (4 * numbers + activations), 5),
        (False, 8 * 12 * numbers, 1),
    ):
        monkeypatch.setattr(grouping, "usable_memory", lambda prepared, usable=usable: usable + 1)
        assert grouping.find_grouping(prepared, waiting=waits).size == size


def test_a_limit_of_a_container_counts(tmp_path: Path) -> None:
    def group(folder: str, **files: object) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / folder / name.replace("__", ".")).write_text(f"{content}\n")

    machine = free_memory(tmp_path)
    assert machine > 10**6
    group("proc/self", cgroup="0::/jobs/one")
    stat = "anon 1\nactive_file 30\ninactive_file 20"
    group("sys/fs/cgroup/jobs", memory__max=1000, memory__current=400, memory__stat=stat)
    group("sys/fs/cgroup/jobs/one", memory__max="max", memory__current=400, memory__stat=stat)
    assert free_memory(tmp_path) == 1000 - 400 + 50
    group("sys/fs/cgroup/jobs/one", memory__max=500)
    assert free_memory(tmp_path) == 500 - 400 + 50
    group("proc/self", cgroup="4:cpu,memory:/seen/from/outside")
    group(
        "sys/fs/cgroup/memory",
        memory__limit_in_bytes=300,
        memory__usage_in_bytes=200,
        memory__stat="active_file 0\ntotal_active_file 5\ntotal_inactive_file 6",
    )
    assert free_memory(tmp_path) == 300 - 200 + 11


@pytest.mark.parametrize("metadata", [None, {"first": "3"}, {"peers": '["ä", "b"]'}])
def test_a_file_in_pieces_is_the_file_that_safetensors_writes(metadata: Any) -> None:
    tensors = {
        "b/ü": torch.arange(6.0).view(2, 3),
        "a": torch.arange(4.0).view(2, 2).T.bfloat16(),
        "step": torch.tensor(3.0),
        "64": torch.zeros(0, 2, dtype=torch.float64),
    }
    for some in (tensors, {}):
        written = b"".join(bytes(piece) for piece in pieces(some, metadata))
        contiguous = {name: tensor.contiguous() for name, tensor in some.items()}
        assert written == save(contiguous, metadata)
