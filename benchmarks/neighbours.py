"""Memory and time of one peer that exchanges a 20 MB adapter with 1, 2, 4 and 8 neighbours at once,
over TLS on loopback.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dlora.decentralized.peer.exchange import Exchange
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages_on_disk import round_message
from dlora.decentralized.peer.patience import Patience
from dlora.identity.federation import Federation, FederationFile, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.identity.signatures import MemberSignatures
from dlora.net.grpc import GrpcNetwork
from dlora.wire.peer.codec import PEERS

MESSAGE_BYTES = 20_000_000
COUNTS = (1, 2, 4, 8)  # neighbours
MAX_ADAPTERS = 4  # beyond training; the rest goes through disk


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) * 1024


class OneSize:
    """Messages of random bytes, all of one length."""

    def sizes(self, message: str) -> range:
        """That length."""
        return range(MESSAGE_BYTES, MESSAGE_BYTES + 1)

    def encode(self, message: str, tensors: Mapping[str, Tensor]) -> bytes:
        """Not called: the message is not made of tensors."""
        raise NotImplementedError

    def decode(self, message: str, path: Path) -> Mapping[str, Tensor]:
        """Not called: nothing is mixed."""
        raise NotImplementedError


async def one_round(name: str, neighbours: Sequence[str], folder: Path) -> float:
    """Seconds of one exchange of ``name`` with all its neighbours."""
    path = folder / "federation.yaml"
    federation = Federation.load(path)
    network = GrpcNetwork(
        Identity.load(name, folder / f"{name}.key", federation),
        FederationFile(path),
        neighbours,
        federation.member(name).address,
        PEERS,
    )
    ledger = Ledger(folder / name)
    exchange = Exchange(
        name=name,
        manifest="{}",
        manifest_hash="0" * 64,
        ledger=ledger,
        neighbours=neighbours,
        patience=Patience(60.0, 600.0),
        messages=OneSize(),
        check=lambda neighbour, message, path: None,
        report=lambda event: None,
        signatures=MemberSignatures(network.identity, network.federation),
    )
    serving = asyncio.create_task(network.serve(exchange.talk))
    exchange.enter(0)
    await exchange.greeted(60.0)
    ledger.keep(round_message(0), random.Random(name).randbytes(MESSAGE_BYTES))
    began_at = time.monotonic()
    await exchange.mix_round(neighbours)
    seconds = time.monotonic() - began_at
    assert all(ledger.state(0, other) == "committed" for other in neighbours)
    exchange.enter(1)
    await exchange.settled(1)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    ledger.close()
    return seconds


def hub(neighbours: Sequence[str], folder: Path, told: Any) -> None:
    """The peer that is measured, in a process of its own."""
    random.Random(0).randbytes(MESSAGE_BYTES)  # what making the message takes is not the exchange's
    before_bytes = peak_bytes()
    told.send((asyncio.run(one_round("hub", neighbours, folder)), peak_bytes() - before_bytes))


async def others(names: Sequence[str], folder: Path) -> None:
    """The neighbours, all in this process."""
    await asyncio.gather(*(one_round(name, ["hub"], folder) for name in names))


def main() -> None:
    """Print the table."""
    print(
        "| neighbours | s | peak memory of the exchange, MB | adapters of 20 MB"
        " |\n|---|---|---|---|"
    )
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as temporary:
            folder, names = Path(temporary), [f"peer-{number}" for number in range(count)]
            with socket.create_server(("127.0.0.1", 0)) as probe:
                address = f"127.0.0.1:{probe.getsockname()[1]}"
            members = [new_identity("hub", address, "peer", folder)[1]]
            members += [new_identity(name, None, "peer", folder)[1] for name in names]
            (folder / "federation.yaml").write_text(federation_text(members))
            here, there = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(
                target=hub, args=(names, folder, there)
            )
            process.start()
            asyncio.run(others(names, folder))
            seconds, grown_bytes = here.recv()
            process.join()
        print(
            f"| {count} | {seconds:.2f} | {grown_bytes / 1e6:.1f} |"
            f" {grown_bytes / MESSAGE_BYTES:.2f} |"
        )
    print(f"\nTarget: at most {MAX_ADAPTERS} adapters, whatever the number of neighbours.")


if __name__ == "__main__":
    main()
