"""The folder of a run: who may write there, its checkpoints, and what resuming compares."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
import yaml

from dlora.config.reading import parse_section
from dlora.config.run import Config
from dlora.errors import ConfigError, RunError
from dlora.files import sync_folder, write_atomically
from dlora.run.checkpoint_files import (
    Checkpoint,
    read_checkpoint,
    write_part,
    write_result,
    write_state,
)
from dlora.run.lock import LOCK_FILE, cannot_make, check_unused
from dlora.run.ranks import ALONE, Ranks

T = TypeVar("T")

# Keys that may differ when a run is resumed: where the run and its core directions are, which peers
# get their own scores, and how long one peer waits for its neighbours.
LOCAL_KEYS = {"output_dir", "lora.frame", "eval_peers", "device_map", "shard_model"} | {
    f"peers.{key}" for key in ("silence_s", "round_limit_s", "catch_up_after")
}
ALL_ADAPTERS = "peers"  # the files of a run of many peers


class RunFolder:
    """``output_dir`` of one config: `create` makes it new, `resume` opens it again.

    ``ranks``: the processes of the run. They call `save`, `finish` and `latest` together.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path, self.ranks = path, ranks
        self.log_path = path / "log.jsonl"
        self._damaged: set[Path] = set()  # checkpoints that `latest` found so

    @classmethod
    def check_new(cls, config: Config, own: str | None = None) -> None:
        """Raise RunError if ``output_dir`` is taken. Makes nothing. ``own`` as for `check_same`."""
        path = Path(config.output_dir)
        check_unused(path)
        cls._check_empty(path, config, own)

    @staticmethod
    def _check_empty(path: Path, config: Config, own: str | None) -> None:
        try:
            taken = path.exists() and (
                not path.is_dir() or any(file.name != LOCK_FILE for file in path.iterdir())
            )
        except (OSError, ValueError) as error:  # a name that is too long, or no permission to look
            raise cannot_make(path, error) from error
        if not taken:
            return
        if not (path / "config.yaml").is_file():
            what = "holds files that are no run" if path.is_dir() else "is a file"
            raise RunError(
                f"output_dir {path} {what}; choose another with --set output_dir=..., or remove it"
            )
        if _why_another(path, config, own) is None:
            raise RunError(
                f"output_dir {path} holds this run; go on with --resume, or choose another with"
                " --set output_dir=..."
            )
        raise RunError(
            f"output_dir {path} holds another run; choose another with --set output_dir=..., or go"
            " on with that one by its own config.yaml and --resume"
        )

    @classmethod
    def standing(cls, config: Config) -> str | None:
        """One line if ``output_dir`` holds this run already, else None; warns if it holds another
        run.

        Raises RunError as `check_new` does.
        """
        path = Path(config.output_dir)
        if not (path / "config.yaml").is_file():
            cls.check_new(config)
            return None
        if why := _why_another(path, config, None):
            warnings.warn(
                f"output_dir {path} holds another run, so this one would not start ({why})",
                stacklevel=2,
            )
            return None
        return (
            f"{path} holds this run already: --resume goes on with it, a new one takes --set"
            " output_dir=..."
        )

    @classmethod
    def check_same(cls, config: Config, own: str | None = None) -> None:
        """Raise RunError unless ``output_dir`` holds this run with this config; `train.rounds` may
        be larger.

        ``own``: the participant whose run it is; None: a simulation of all. Changes nothing.
        """
        path = Path(config.output_dir)
        check_unused(path)
        if not (path / "config.yaml").exists():
            raise RunError(
                f"{path} holds no run (no config.yaml); start one without --resume, or give its"
                " --set output_dir=..."
            )
        if why := _why_another(path, config, own):
            raise why

    @classmethod
    def create(cls, config: Config, own: str | None = None) -> RunFolder:
        """Make ``output_dir`` and write the resolved config. Raises RunError when it is taken or
        cannot be written.
        """
        folder = cls(Path(config.output_dir))
        cls._check_empty(folder.path, config, own)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_atomically(folder.path / "config.yaml", config.dump())
        except (OSError, RunError) as error:
            raise cannot_make(
                folder.path, error if isinstance(error, OSError) else error.__cause__
            ) from error
        return folder

    @classmethod
    def resume(cls, config: Config, manifest: str) -> RunFolder:
        """Open the run in ``output_dir`` again; call `check_same` before.

        Raises RunError if a key of the manifest (canonical JSON) differs.
        """
        folder = cls(Path(config.output_dir))
        agreed = _read_manifest(folder.path)
        for key, value in json.loads(manifest).items():
            if agreed is not None and agreed.get(key) != value:
                raise _changed(f"the {key} of manifest.json", agreed.get(key), value)
        write_atomically(folder.path / "config.yaml", config.dump())
        return folder

    def remove(self) -> None:
        """Remove the folder that `create` made, with all its content."""
        shutil.rmtree(self.path, ignore_errors=True)

    def save(self, run: str, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and keep the one before it, so that a crash leaves a whole one.

        Each rank calls it with the participants that it holds; where all hold the same, the main
        rank writes them. Raises RunError if there is no space or no permission; earlier checkpoints
        then stay.
        """
        ranks, runs = self.ranks, self.path / "checkpoints" / run
        target = runs / f"round-{checkpoint.rounds_done:06d}"
        partial = runs / f".{target.name}.partial"

        def begin() -> None:
            for leftover in runs.glob(".*.partial"):  # left by a process that was killed meanwhile
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)

        parts = ranks.size if checkpoint.here is not None else 1

        def write() -> str:
            if parts == 1 and not ranks.is_main:
                return ""
            return write_part(partial, checkpoint, ranks.rank, parts)

        def commit() -> None:
            write_state(partial, checkpoint.state, "".join(sums))
            self._take_place(partial, target)

        try:
            ranks.on_main(lambda: _saving(target, begin))
            sums = ranks.gathered(ranks.together(lambda: _saving(target, write)))
            ranks.on_main(lambda: _saving(target, commit))
        finally:
            if ranks.is_main:  # on a full disk, this frees the space again
                shutil.rmtree(partial, ignore_errors=True)
        if ranks.is_main:
            self._keep_two(run)

    def _take_place(self, partial: Path, target: Path) -> None:
        aside = target.with_name(f"{target.name}.before")
        # the same round again: rename, so that one whole checkpoint exists at every moment
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
            self._damaged = {aside if path == target else path for path in self._damaged}
        partial.rename(target)
        sync_folder(target.parent)

    def _keep_two(self, run: str) -> None:
        _, *older = self._newest_first(run)
        whole = [path for path in older if path not in self._damaged]
        for path in older:
            if path not in whole[:1]:
                shutil.rmtree(path, ignore_errors=True)

    def finish(self, run: str, rounds_done: int, result: dict[str, Any]) -> None:
        """Write the result of a finished run beside its last checkpoint."""
        folder = self.path / "checkpoints" / run / f"round-{rounds_done:06d}"
        self.ranks.on_main(lambda: write_result(folder, result))

    def latest(self, run: str, here: range | None = None) -> Checkpoint | None:
        """The newest whole checkpoint of ``run``, or None if there is none. Warns of a damaged
        newer one.

        ``here``: the participants whose tensors this rank reads; None: all. Raises RunError if all
        checkpoints are damaged.
        """
        found: list[Checkpoint] = []
        newest = self.ranks.on_main(lambda: self._newest_whole(run, here, found))

        def read() -> Checkpoint | None:
            if newest is None or self.ranks.is_main:
                return found[0] if found else None
            try:
                return read_checkpoint(newest, here, check=False)
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                raise RunError(
                    f"{newest} cannot be read ({' '.join(str(error).split())}); all ranks need the"
                    " same output_dir, on a disk that all machines share"
                ) from error

        return self.ranks.together(read)

    def _newest_whole(self, run: str, here: range | None, found: list[Checkpoint]) -> Path | None:
        """The folder of the newest whole checkpoint, which is put into ``found``."""
        damages = []
        for folder in self._newest_first(run):
            try:
                found.append(read_checkpoint(folder, here))
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                damages.append(
                    f"checkpoint {folder} cannot be read ({' '.join(str(error).split())})"
                )
                self._damaged.add(folder)
                continue
            if damages:
                warnings.warn(
                    f"{'; '.join(damages)}; going back to {folder.name}, the one before it",
                    stacklevel=2,
                )
            return folder
        if damages:
            raise RunError(f"{'; '.join(damages)}; restore it, or start anew in another output_dir")
        return None

    def _newest_first(self, run: str) -> list[Path]:
        """All checkpoints, newest first; one named ``.before`` is older than another of the same
        round.
        """
        found = (self.path / "checkpoints" / run).glob("round-*")
        return sorted(found, key=lambda path: (path.stem, path.suffix == ""), reverse=True)


def _saving(target: Path, action: Callable[[], T]) -> T:
    try:
        return action()
    except OSError as error:
        raise RunError(
            f"checkpoint {target} cannot be made ({error.strerror}); fix that, then add --resume"
        ) from error


def read_config(path: Path) -> Config:
    """The config of the run in ``path``. Raises RunError if there is no run or its config is
    damaged.
    """
    try:
        return parse_section(Config, yaml.safe_load((path / "config.yaml").read_text()))
    except OSError as error:
        raise RunError(f"{path} holds no run (no config.yaml); give the folder of a run") from error
    except (ValueError, yaml.YAMLError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"{path}/config.yaml is not what this run wrote ({reason}); restore it, or start anew"
        ) from error


def resume_command(path: Path) -> str:
    """The command that resumes the run in ``path``."""
    own, config = (_first_event(path) or {}).get("own"), f"{path}/config.yaml"
    if own is None:
        return f"dlora simulate {config} --resume"
    program = "peer" if read_config(path).split is None else "device"
    return (
        f"dlora {program} {config} --name {own} --key {own}.key --federation federation.yaml"
        " --resume"
    )


def _first_event(path: Path) -> dict[str, Any] | None:
    """The first event in the log of the run in ``path``; None if it was not written."""
    try:
        with open(path / "log.jsonl", encoding="utf-8") as log:
            event = json.loads(log.readline())
    except (OSError, ValueError):
        return None
    return event if isinstance(event, dict) else None


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of the run in ``path``; None if it was not written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it is no JSON object")
        return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}/manifest.json cannot be read ({error}); restore it, or start anew"
        ) from error


def _why_another(path: Path, config: Config, own: str | None) -> RunError | None:
    """Why the run in ``path`` cannot be resumed for ``own`` with ``config``; None: it can."""
    try:
        stored = read_config(path)
    except RunError as damaged:
        return damaged
    began = _first_event(path)
    if began and began.get("own") != own:
        return RunError(
            f"resume: {path} holds a run of another kind or participant; go on with:"
            f" {resume_command(path)}"
        )
    before, now = leaves(stored.model_dump(mode="json")), leaves(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or key in LOCAL_KEYS:
            continue
        if key == "train.rounds" and config.train.rounds > stored.train.rounds:
            if config.train.lr_scheduler_type == "constant":
                continue
            return RunError(
                f"resume: train.rounds was {stored.train.rounds} and is {config.train.rounds}, but"
                f" under a {config.train.lr_scheduler_type} learning rate a longer run takes other"
                " steps from the start; start anew"
            )
        return _changed(key, before.get(key), now.get(key))
    return None


def _changed(key: str, before: Any, now: Any) -> RunError:
    was, now_is = (
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in (before, now)
    )
    return RunError(
        f"resume: {key} was {was} and is {now_is}; put it back, or start anew in another output_dir"
    )


def environment(group_size: int, ranks: Ranks = ALONE) -> dict[str, Any]:
    """What the last bit of a resumed run depends on, besides the config."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "group_size": group_size,
        **({"ranks": ranks.size} if ranks.are_several else {}),
    }


def warn_of_another(stored: dict[str, Any], here: dict[str, Any]) -> None:
    """Warn if a run was saved with another torch, number of threads or group size."""
    if stored != here:
        warnings.warn(
            f"this run was saved with {stored} and goes on with {here}: right, but not bit for bit",
            stacklevel=2,
        )


def leaves(tree: Any, key: str = "") -> dict[str, Any]:
    """The values of a config by their dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    return {
        path: leaf
        for name, inner in tree.items()
        for path, leaf in leaves(inner, f"{key}.{name}".strip(".")).items()
    }
