"""A training script as several peers on this machine: real processes, real TLS on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dlora.config.peers_file import PeersFile
from dlora.errors import ConfigError, Interrupted
from dlora.events.log import read_log
from dlora.files import write_atomically
from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity

LOOK_S = 0.1  # seconds between two looks at the processes
TERM_S = 10.0  # seconds in which a process may end by itself after SIGTERM


def local(
    script: str,
    arguments: Sequence[str] = (),
    *,
    peers: int = 4,
    rounds: int = 10,
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
    say: Callable[[str], object] = print,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Start ``script`` once for each of ``peers`` peers and wait until all have ended.

    A script whose name ends in .py runs in this Python; any other is a command. Each process finds
    its own DLORA_NAME, DLORA_KEY, DLORA_FEDERATION, DLORA_PEERS and DLORA_LISTEN, which
    `dlora.Peer` reads, and DLORA_INDEX (from 0) and DLORA_COUNT, by which a script chooses its
    part of the data. Identities, federation and state are in ``folder``, or in a temporary folder
    that is removed at the end. ``overrides``: other keys of peers.yaml. ``say`` gets every line of
    output, with the peer's name before it. When one process fails, the others are stopped.

    Returns what each peer did. Raises ConfigError if nothing can be started, Interrupted once
    ``stop()`` is true.
    """
    if script.endswith(".py") and not Path(script).is_file():
        raise ConfigError(f"{script} is no file; give the path of a training script")
    with contextlib.ExitStack() as held:
        place = Path(folder or held.enter_context(tempfile.TemporaryDirectory(prefix="dlora-")))
        place = place.resolve()
        names = [f"peer-{index}" for index in range(peers)]
        ports = _federated(place, names, rounds, overrides)
        command = [sys.executable, "-u", script] if script.endswith(".py") else [script]
        processes = {}
        for index, name in enumerate(names):
            environment = _environment(place, name, index, peers, ports[index])
            processes[name] = _Process(name, [*command, *arguments], environment, say)
        try:
            _wait(processes, stop, say)
        finally:
            _end(processes)
        return {
            "peers": {
                name: {"exit_code": process.popen.returncode, **_mixed(place / "state" / name)}
                for name, process in processes.items()
            }
        }


def _federated(
    folder: Path, names: Sequence[str], rounds: int, overrides: Sequence[str]
) -> list[int]:
    """Write keys, federation.yaml and peers.yaml; returns a free port for each member."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"--folder {folder} is not empty; name a new folder")
    ports = free_ports(len(names))
    members = [
        new_identity(name, f"127.0.0.1:{port}", "peer", folder)[1]
        for name, port in zip(names, ports, strict=True)
    ]
    write_atomically(folder / "federation.yaml", federation_text(members))
    tree = {"members": list(names), "rounds": rounds, "state_dir": str(folder / "state")}
    write_atomically(folder / "peers.yaml", yaml.safe_dump(tree))
    section = PeersFile.load(folder / "peers.yaml", tuple(overrides))
    kept = section.model_dump(mode="json", exclude_none=True)
    write_atomically(folder / "peers.yaml", yaml.safe_dump(kept))
    return ports


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens, below those that the system gives to programs that dial."""
    found: list[int] = []
    port = 15_000 + os.getpid() * 37 % 15_000
    while len(found) < count:
        port += 1
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def _environment(folder: Path, name: str, index: int, count: int, port: int) -> dict[str, str]:
    cores = os.cpu_count() or 1
    # a thread a core for each process would make all of them slower
    threads = {"OMP_NUM_THREADS": str(max(1, cores // count))}
    return (
        threads
        | os.environ
        | {
            "DLORA_NAME": name,
            "DLORA_KEY": str(folder / f"{name}.key"),
            "DLORA_FEDERATION": str(folder / "federation.yaml"),
            "DLORA_PEERS": str(folder / "peers.yaml"),
            "DLORA_LISTEN": f"127.0.0.1:{port}",
            "DLORA_INDEX": str(index),
            "DLORA_COUNT": str(count),
        }
    )


class _Process:
    """One peer's process; a thread passes its lines on."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        say: Callable[[str], object],
    ) -> None:
        try:
            self.popen = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to this command, which ends them
            )
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started ({error.strerror})") from error
        self._reader = threading.Thread(target=self._pass_on, args=(name, say), daemon=True)
        self._reader.start()

    def _pass_on(self, name: str, say: Callable[[str], object]) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as lines:
            for line in lines:
                # a progress bar writes over its own line; its last state is enough
                text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
                say(f"{name} | {text}")

    def end(self, number: signal.Signals) -> None:
        """Send a signal to the process and to all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def close(self) -> None:
        """Wait for the last lines."""
        self.popen.wait()
        self._reader.join()


def _wait(
    processes: dict[str, _Process], stop: Callable[[], bool], say: Callable[[str], object]
) -> None:
    while any(process.popen.poll() is None for process in processes.values()):
        failed = [name for name, process in processes.items() if process.popen.poll()]
        if failed:
            code = processes[failed[0]].popen.returncode
            say(f"{failed[0]} failed with exit code {code}; the others are stopped")
            return
        if stop():
            raise Interrupted("stopped; all peers were ended")
        time.sleep(LOOK_S)


def _end(processes: dict[str, _Process]) -> None:
    """Stop all processes that still run, and wait until they have ended."""
    running = [process for process in processes.values() if process.popen.poll() is None]
    for process in running:
        process.end(signal.SIGTERM)
    limit = time.monotonic() + TERM_S
    while time.monotonic() < limit and any(one.popen.poll() is None for one in running):
        time.sleep(LOOK_S)
    for process in running:
        process.end(signal.SIGKILL)
    for process in processes.values():
        process.close()


def _mixed(folder: Path) -> dict[str, Any]:
    """What a peer's log says about its rounds."""
    log = folder / "log.jsonl"
    events: list[Any] = list(_rounds(log)) if log.exists() else []
    return {
        "rounds": len(events),
        "edges": sum(len(event["neighbours"]) for event in events),
        "num_bytes": sum(event["num_bytes"] for event in events),
        "wait_s": sum(event["wait_s"] for event in events),
    }


def _rounds(log: Path) -> Iterator[Any]:
    return (event for event in read_log(log) if event["event"] == "mixed")
