"""A federation on this machine: keys, a config of tiny parts, and `dlora` processes that never
outlive a test.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dlora.config.run import Config
from dlora.events.log import read_log
from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from kit import tiny_models
from kit.call_cli import Outcome, change, without_news
from kit.ports import free_ports

HUB = "hub"
# in the order of the ring, which is not that of the letters
NAMES = ("north", "east", "south", "west")
LIMIT_S = 90.0  # for anything that is waited for here
Entry = dict[str, Any]
Some = TypeVar("Some", bound="Processes")

# Importing takes a peer seconds and running one less than that. So a server of processes imports
# once, and each peer is forked from it: a process like any other from there on, with its own event
# loop, sockets and death.
FORKS = multiprocessing.get_context("forkserver")
_PROGRAMS = [
    "dlora.cli",
    "dlora.programs.peer",
    "dlora.programs.cloud",
    "dlora.programs.device",
    "dlora.programs.trainer_callback",
    "dlora.show.report.write",
]
FORKS.set_forkserver_preload([*_PROGRAMS, "transformers.models.bert.modeling_bert"])


def run_dlora(arguments: Sequence[str], out: Path, err: Path) -> None:
    """What a forked process does: `dlora ARGUMENTS`, its output in two files."""
    from dlora import cli

    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    sys.argv = ["dlora", *arguments]
    try:
        cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """Look again and again until ``condition`` holds; fail after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:g} s for: {what}"
        time.sleep(0.002)


class Processes:
    """Members on this machine, each of whom can be started and ended in every way; their runs lie
    in runs/NAME.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # multiprocessing's; its kinds of process share no public class
        self.processes: dict[str, Any] = {}
        self.tries: dict[str, int] = {}
        # of members that run something else
        self.programs: dict[str, Callable[[Sequence[str], Path, Path], None]] = {}

    def arguments(self, name: str, *more: str) -> list[str]:
        """What is typed after `dlora` to take part as ``name``."""
        raise NotImplementedError

    def credentials(self, name: str) -> list[str]:
        files = [
            "--key",
            str(self.folder / f"{name}.key"),
            "--federation",
            str(self.folder / "federation.yaml"),
        ]
        return ["--name", name, *files]

    def run(self, name: str) -> Path:
        """The run folder of ``name``."""
        return self.folder / "runs" / name

    def start(self, name: str, *more: str) -> None:
        """Start ``name``."""
        self.start_as(name, self.programs.get(name, run_dlora), more=more)

    def start_as(
        self, name: str, program: Callable[..., None], *given: Any, more: Sequence[str] = ()
    ) -> None:
        """Start ``name`` as another program: ``program(arguments, out, err, *given)`` in a process
        of its own.
        """
        self.tries[name] = self.tries.get(name, 0) + 1
        told = self._said(name, "out"), self._said(name, "err")
        process = FORKS.Process(
            target=program, args=(self.arguments(name, *more), *told, *given), daemon=True
        )
        process.start()
        self.processes[name] = process

    def finish(self, name: str, limit_s: float = LIMIT_S) -> Outcome:
        """Wait for the process of ``name`` and read what it printed."""
        self.processes[name].join(limit_s)
        exit_code = self.processes[name].exitcode
        assert exit_code is not None, f"{name} still runs after {limit_s:g} s"
        return Outcome(
            exit_code,
            self._said(name, "out").read_text(),
            without_news(self._said(name, "err").read_text()),
        )

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self.processes[name].pid, number)

    def is_stopped(self, name: str) -> bool:
        """Whether SIGSTOP has taken hold: nothing runs in it any more."""
        return (
            Path(f"/proc/{self.processes[name].pid}/stat").read_text().rpartition(")")[2].split()[0]
            == "T"
        )

    def kill_in(self, name: str, phase: Callable[[], bool], what: str) -> None:
        """kill -9 within a phase, however short."""
        self.freeze_in(name, phase, what)
        self.kill(name)

    def freeze_in(self, name: str, phase: Callable[[], bool], what: str) -> None:
        """SIGSTOP within a phase that may be short: stop the process, look whether the phase still
        is, else go on.
        """

        def caught() -> bool:
            assert self.processes[name].is_alive(), (
                f"{name} ended before: {what}\n{self._said(name, 'err').read_text()}"
            )
            if not phase():
                return False
            self.signal(name, signal.SIGSTOP)
            until(lambda: self.is_stopped(name), f"{name} to stop")
            if phase():
                return True
            self.signal(name, signal.SIGCONT)
            return False

        until(caught, what)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].join(LIMIT_S)

    def reap(self) -> None:
        """End what still runs."""
        for name in self.processes:
            self.kill(name)

    def events(self, name: str, kind: str) -> list[Entry]:
        """Those of the log of one kind; none before there is a log."""
        path = self.run(name) / "log.jsonl"
        return (
            [event for event in read_log(path) if event["event"] == kind] if path.exists() else []
        )

    def rounds_done(self, name: str) -> int:
        return max((event["round"] + 1 for event in self.events(name, "round")), default=0)

    def summary(self, name: str) -> Entry:
        summary: Entry = json.loads((self.run(name) / "summary.json").read_text())
        return summary

    def _said(self, name: str, where: str) -> Path:
        return self.folder / f"{name}.{self.tries[name]}.{where}"


class Federation(Processes):
    """Members with keys and rows of their own in one folder: NAME.key, NAME.jsonl, federation.yaml,
    run.yaml, runs/NAME.
    """

    def __init__(
        self,
        folder: Path,
        model: Path | str,
        changes: Mapping[str, Any] | None = None,
        names: Sequence[str] = NAMES,
        dial_only: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self.names = tuple(names)
        members = []
        for index, (name, port) in enumerate(zip(self.names, free_ports(len(names)), strict=True)):
            address = None if name in dial_only else f"127.0.0.1:{port}"
            members.append(new_identity(name, address, "peer", folder)[1])
            tiny_models.write_rows(folder / f"{name}.jsonl", 16 + 2 * index, start=20 * index)
        (folder / "federation.yaml").write_text(federation_text(members))
        tiny_models.write_rows(folder / "eval.jsonl", 16, start=100)
        tree: dict[str, Any] = {
            "model": str(model),
            "device": "cpu",
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "dense"]},
            "data": {
                "train": {name: str(folder / f"{name}.jsonl") for name in self.names},
                "eval": str(folder / "eval.jsonl"),
                "labels": ["0", "1"],
                "max_length": 16,
                "partition": {"kind": "files"},
            },
            "train": {
                "rounds": 4,
                "local_steps": 2,
                "per_device_train_batch_size": 4,
                "learning_rate": 5e-3,
            },
            "peers": {"members": list(self.names), "topology": {"kind": "ring"}},
            "output_dir": str(folder / "runs" / "simulation"),
        }
        change(tree, changes or {})
        self.config_path = folder / "run.yaml"
        self.config_path.write_text(yaml.safe_dump(tree))

    @property
    def config(self) -> Config:
        return Config.load(self.config_path)

    def arguments(self, name: str, *more: str) -> list[str]:
        own = ["--set", f"output_dir={self.run(name)}", *more]
        return ["peer", str(self.config_path), *self.credentials(name), *own]

    def start_all(self) -> None:
        for name in self.names:
            self.start(name)

    def finish_all(self, limit_s: float = LIMIT_S) -> dict[str, Outcome]:
        return {name: self.finish(name, limit_s) for name in self.names}

    # What is on the disks

    def ledger(self, name: str) -> dict[tuple[int, str], str]:
        """(round, neighbour) -> promised, committed or dropped."""
        path = self.run(name) / "exchange" / "edges.jsonl"
        entries = read_log(path) if path.exists() else []
        return {(entry["round"], entry["neighbour"]): entry["event"] for entry in entries}

    def assert_agreed(self) -> None:
        """All are done: one consensus adapter to the last byte, of all peers; the two ends of every
        edge tell one story.
        """
        adapters = {
            (self.run(name) / "consensus" / "adapter_model.safetensors").read_bytes()
            for name in self.names
        }
        assert len(adapters) == 1
        assert {
            self.summary(name)["runs"]["dec-lora"]["consensus_peers"] for name in self.names
        } == {len(self.names)}
        ledgers = {name: self.ledger(name) for name in self.names}
        for name, ledger in ledgers.items():
            assert "promised" not in ledger.values(), f"{name} is in doubt"
            for (round, neighbour), state in ledger.items():
                # One end may have left an edge out without an entry: it had promised nothing.
                assert (ledgers[neighbour].get((round, name), "dropped")) == state, (
                    round,
                    name,
                    neighbour,
                )


class Split(Processes):
    """A cloud called hub, and devices with rows of their own: cloud.yaml, run.yaml, and the files
    of a federation.

    ``dialled`` is what the devices dial instead of the cloud's own address.
    """

    def __init__(
        self,
        folder: Path,
        model: Path | str,
        changes: Mapping[str, Any] | None = None,
        devices: Sequence[str] = ("phone",),
        cloud: Mapping[str, Any] | None = None,
        dialled: str | None = None,
    ) -> None:
        super().__init__(folder)
        self.model, self.devices = model, tuple(devices)
        self.address, self.metrics = (f"127.0.0.1:{port}" for port in free_ports(2))
        members = [new_identity(HUB, dialled or self.address, "cloud", folder)[1]]
        for index, name in enumerate(self.devices):
            members.append(new_identity(name, None, "device", folder)[1])
            tiny_models.write_rows(folder / f"{name}.jsonl", 16 + 2 * index, start=20 * index)
        (folder / "federation.yaml").write_text(federation_text(members))
        tiny_models.write_rows(folder / "eval.jsonl", 16, start=100)
        tree = {
            "model": str(model),
            "device": "cpu",
            "listen": self.address,
            "metrics": self.metrics,
        }
        change(tree, cloud or {})
        (folder / "cloud.yaml").write_text(yaml.safe_dump(tree))
        self.changes = dict(changes or {})

    def config(self, name: str, changes: Mapping[str, Any] | None = None) -> Config:
        """What the device ``name`` runs."""
        data = {
            "train": {name: str(self.folder / f"{name}.jsonl")},
            "eval": str(self.folder / "eval.jsonl"),
        }
        tree: dict[str, Any] = {
            "model": str(self.model),
            "device": "cpu",
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "key", "value", "dense"]},
            "data": {
                **data,
                "labels": ["0", "1"],
                "max_length": 16,
                "partition": {"kind": "files"},
            },
            "train": {
                "rounds": 4,
                "local_steps": 2,
                "per_device_train_batch_size": 4,
                "learning_rate": 5e-3,
            },
            "split": {"cloud": HUB, "wire": "float32"},
            "eval_every": 0,
            "output_dir": str(self.run(name)),
        }
        change(tree, {**self.changes, **(changes or {})})
        return Config.parse(tree)

    def arguments(self, name: str, *more: str) -> list[str]:
        if name == HUB:
            return ["cloud", str(self.folder / "cloud.yaml"), *self.credentials(name), *more]
        path = self.folder / f"{name}.yaml"
        path.write_text(self.config(name).dump())
        return ["device", str(path), *self.credentials(name), *more]

    def start_hub(self, *more: str) -> None:
        """Start the cloud and wait until it serves."""
        self.start(HUB, *more)

        def serves() -> bool:
            assert self.processes[HUB].is_alive(), self._said(HUB, "err").read_text()
            said = self._said(HUB, "err")
            return said.exists() and "\nserving " in "\n" + said.read_text()

        until(serves, "the cloud to serve")

    def scraped(self) -> dict[str, float]:
        """The cloud's metrics now."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=LIMIT_S) as answer:
            lines = answer.read().decode().splitlines()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }

    def adapter(self, name: str) -> bytes:
        """The factors that the device ended with, to the last bit."""
        return (self.run(name) / "consensus" / "adapter_model.safetensors").read_bytes()


@contextmanager
def running(federation: Some) -> Iterator[Some]:
    """No process of it is left behind, whatever happens."""
    try:
        yield federation
    finally:
        federation.reap()
