"""Where one peer stands: who it is, and its ledger, its links and its log while it takes part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.config.peers import PeersSection
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages import TensorMessages
from dlora.decentralized.peer.word import Signatures
from dlora.decentralized.topology import Topology
from dlora.events.log import RunLog
from dlora.identity.federation import FederationFile
from dlora.identity.keys import Identity
from dlora.identity.signatures import MemberSignatures
from dlora.net.grpc import GrpcNetwork
from dlora.net.listen_address import certificate_teller, refusal_teller
from dlora.net.loop_thread import LoopThread
from dlora.net.transport import Network
from dlora.wire.peer.codec import PEERS


@dataclass(kw_only=True)
class Place:
    """What one peer keeps and uses while it takes part.

    ``manifest``: what all peers must agree on. ``messages``: which messages the run has.
    """

    name: str
    section: PeersSection
    topology: Topology
    messages: TensorMessages
    manifest: Mapping[str, Any]
    ledger: Ledger
    network: Network
    signatures: Signatures
    log: RunLog
    loop: LoopThread


@contextlib.contextmanager
def placed(
    identity: Identity,
    federation: FederationFile,
    listen: str | None,
    *,
    ledger: Path,
    section: PeersSection,
    topology: Topology,
    messages: TensorMessages,
    manifest: Mapping[str, Any],
    log: RunLog,
) -> Iterator[Place]:
    """The place of the member ``identity``, with links over gRPC.

    ``listen``: HOST:PORT on which links are accepted; None: this member only dials. ``ledger``: the
    ledger's folder.
    """
    network = GrpcNetwork(
        identity,
        federation,
        topology.neighbour_names(identity.name),
        listen,
        PEERS,
        refusal_teller(log),
        on_certificate=certificate_teller(log),
    )
    with contextlib.closing(Ledger(ledger)) as opened, LoopThread() as loop:
        yield Place(
            name=identity.name,
            section=section,
            topology=topology,
            messages=messages,
            manifest=manifest,
            ledger=opened,
            network=network,
            signatures=MemberSignatures(identity, federation),
            log=log,
            loop=loop,
        )
