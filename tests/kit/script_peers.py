"""Training scripts of several sites in one process: one thread a site, real TLS on loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import yaml

import dlora
from dlora.decentralized.peer.ledger import Ledger
from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from kit.ports import free_ports

T = TypeVar("T")
LIMIT_S = 120


class Sites:
    """Members with keys in one folder: NAME.key, federation.yaml, peers.yaml, state/NAME."""

    def __init__(self, folder: Path, names: Sequence[str], **section: Any) -> None:
        self.folder, self.names = folder, tuple(names)
        folder.mkdir(parents=True, exist_ok=True)
        members = [
            new_identity(name, f"127.0.0.1:{port}", "peer", folder)[1]
            for name, port in zip(names, free_ports(len(names)), strict=True)
        ]
        (folder / "federation.yaml").write_text(federation_text(members))
        self.section: dict[str, Any] = {
            "members": list(names),
            "rounds": 3,
            "state_dir": str(folder / "state"),
            "round_limit_s": 15,
            "silence_s": 5,
        } | section
        self.write(self.section)

    def write(self, section: Mapping[str, Any]) -> None:
        """Write peers.yaml."""
        (self.folder / "peers.yaml").write_text(yaml.safe_dump(dict(section)))

    def peer(self, name: str, **more: Any) -> dlora.Peer:
        """The peer of one site."""
        return dlora.Peer(**self.arguments(name), **more)

    def arguments(self, name: str) -> dict[str, Any]:
        """The files of one site, as `dlora.Peer` takes them."""
        return {
            "peers": self.folder / "peers.yaml",
            "name": name,
            "key": self.folder / f"{name}.key",
            "federation": self.folder / "federation.yaml",
        }

    def run(self, script: Callable[[str], T], names: Sequence[str] = ()) -> dict[str, T]:
        """Call ``script(name)`` for each site at once; its results, or the first error."""
        names = names or self.names
        with ThreadPoolExecutor(len(names)) as threads:
            running = {name: threads.submit(script, name) for name in names}
            for one in as_completed(running.values(), timeout=LIMIT_S):
                one.result()  # the first error names the cause
            return {name: one.result() for name, one in running.items()}

    def assert_agreed(self) -> None:
        """Both ends of every edge have committed it, or neither; nothing is in doubt."""
        committed: dict[str, set[tuple[int, str]]] = {}
        for name in self.names:
            ledger = Ledger(self.folder / "state" / name)
            committed[name] = ledger.committed()
            assert not any(ledger.in_doubt(other) for other in self.names)
            ledger.close()
        for name, edges in committed.items():
            assert edges, f"{name} mixed nothing"
            for round, other in edges:
                assert (round, name) in committed[other], (round, name, other)


LOCK = threading.Lock()  # what is not safe in several threads at once, such as loading a model
