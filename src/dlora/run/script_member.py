"""Who a training script is among its neighbours, and where it keeps its messages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dlora.config.peers_file import PeersFile
from dlora.decentralized.peer.messages import TensorMessages
from dlora.decentralized.topology import build_topology
from dlora.errors import ConfigError
from dlora.events.log import RunLog
from dlora.identity.federation import FederationFile
from dlora.identity.keys import Identity
from dlora.net.listen_address import check_listen, listen_address
from dlora.run.lock import sole_use
from dlora.run.place import Place, placed


class Member:
    """One member with its files, as a script names them; see `dlora.Peer` for the arguments.

    Raises ConfigError or IdentityError if one of them cannot be used.
    """

    def __init__(
        self,
        peers: str | Path | PeersFile | None,
        name: str | None,
        key: str | Path | None,
        federation: str | Path | None,
        listen: str | None,
    ) -> None:
        self.section = _section(_given("peers", peers))
        self.name = str(_given("name", name))
        self.federation = FederationFile(Path(_given("federation", federation)))
        listed, members = self.federation.current, self.section.members or ()
        if self.name not in members:
            raise ConfigError(
                f"members of peers.yaml does not name {self.name}; it names {', '.join(members)}:"
                " give one of these names, or add it to the file at every site"
            )
        self.identity = Identity.load(self.name, _given("key", key), listed)
        self.listen = listen_address(
            listen or os.environ.get("DLORA_LISTEN"), listed.member(self.name).address
        )
        self.topology = build_topology(self.section.topology, self.section.weights, members)
        listed.check_dialable(self.topology.named_pairs())

    @property
    def folder(self) -> Path:
        """Where this peer keeps messages, decisions and its log."""
        return Path(self.section.state_dir, self.name)

    @contextlib.contextmanager
    def placed(
        self, messages: TensorMessages, manifest: Callable[[], Mapping[str, Any]]
    ) -> Iterator[Place]:
        """Open the ledger and the log in the state folder, which is this process's alone.

        ``manifest()`` is called when it is.
        """
        if self.listen is not None:
            check_listen(self.listen, "listen")
        with (
            sole_use(self.folder),
            RunLog(self.folder / "log.jsonl") as log,
            placed(
                self.identity,
                self.federation,
                self.listen,
                ledger=self.folder,
                section=self.section,
                topology=self.topology,
                messages=messages,
                manifest=manifest(),
                log=log,
            ) as place,
        ):
            yield place


def _section(peers: str | Path | PeersFile) -> PeersFile:
    try:
        return PeersFile.given(peers)
    except ConfigError as error:
        told = str(error) if str(peers) in str(error) else f"{peers}: {error}"
        raise ConfigError(told) from None


def _given(what: str, value: Any) -> Any:
    """An argument, or else its environment variable."""
    value = os.environ.get(f"DLORA_{what.upper()}") if value is None else value
    if value is None:
        raise ConfigError(f"{what} is missing; give it to dlora.Peer, or set DLORA_{what.upper()}")
    return value
