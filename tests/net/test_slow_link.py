"""A slow, long line between two peers: 4 Mbit/s each way, 200 ms there and back, between namespaces
made for it.

The line is that of line.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
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
from kit.slow_line import Speed, command, namespaces

ADDRESSES = {"east": "10.213.7.1", "west": "10.213.7.2"}
PORT = 7000  # in namespaces of our own nobody else listens
MESSAGE_BYTES = 20_000_000
LINE_BYTES_S, ONE_WAY_S = 500_000, 0.1
HEADER_BYTES = 20 + 32  # IPv4, TCP with timestamps, of each packet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip, of iproute2"),
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="needs /dev/net/tun"),
]


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


def node(name: str, folder: Path) -> None:
    """One end: a round's exchange of a message of random bytes, without training. Prints what it
    came to.
    """
    [other] = set(ADDRESSES) - {name}
    path = folder / "federation.yaml"
    identity = Identity.load(name, folder / f"{name}.key", Federation.load(path))
    network = GrpcNetwork(
        identity, FederationFile(path), [other], f"{ADDRESSES[name]}:{PORT}", PEERS
    )
    ledger = Ledger(folder / name)
    story: list[Any] = []

    async def live() -> float:
        exchange = Exchange(
            name=name,
            manifest="{}",
            manifest_hash="0" * 64,
            ledger=ledger,
            neighbours=[other],
            patience=Patience(60.0, 600.0),
            messages=OneSize(),
            check=lambda neighbour, message, path: None,
            report=story.append,
            signatures=MemberSignatures(identity, network.federation),
        )
        serving = asyncio.create_task(network.serve(exchange.talk))
        exchange.enter(0)
        await exchange.greeted(60.0)
        ledger.keep(round_message(0), random.Random(name).randbytes(MESSAGE_BYTES))
        began_at = time.monotonic()
        await exchange.mix_round([other])
        seconds = time.monotonic() - began_at
        exchange.enter(1)
        await exchange.settled(1)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return seconds

    before_bytes = peak_bytes()
    seconds = asyncio.run(live())
    result = {
        "state": ledger.state(0, other),
        "seconds": seconds,
        "sent_bytes": sum(network.traffic.sent_bytes.values()),
        "grown_bytes": peak_bytes() - before_bytes,
        "links": sum(event["event"] == "linked" for event in story),
        "story": story,
    }
    ledger.close()
    print(json.dumps(result))


def on_the_line(space: str) -> tuple[int, int]:
    """Bytes and packets that left this end of the line, by the system's counters."""
    [line] = json.loads(
        command("ip", "-n", space, "-json", "-statistics", "link", "show", "dev", "line0")
    )
    sent = line["stats64"]["tx"]
    return sent["bytes"], sent["packets"]


@pytest.mark.timeout(400)
def test_an_adapter_of_20_mb_crosses_a_slow_line(tmp_path: Path) -> None:
    members = [
        new_identity(name, f"{address}:{PORT}", "peer", tmp_path)[1]
        for name, address in ADDRESSES.items()
    ]
    (tmp_path / "federation.yaml").write_text(federation_text(members))
    results: dict[str, dict[str, Any]] = {}
    try:
        line = ExitStack()
        spaces = line.enter_context(namespaces([ADDRESSES], Speed(LINE_BYTES_S, ONE_WAY_S)))
    except OSError as error:
        pytest.skip(f"no slow line can be made here: {error}")
    with line:
        before = {name: on_the_line(space) for name, space in spaces.items()}
        processes = {
            name: subprocess.Popen(
                ["ip", "netns", "exec", space, sys.executable, __file__, name, str(tmp_path)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            for name, space in spaces.items()
        }
        try:
            for name, process in processes.items():
                results[name] = json.loads(process.communicate(timeout=300)[0])
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
        after = {name: on_the_line(space) for name, space in spaces.items()}
    ideal_s = MESSAGE_BYTES / LINE_BYTES_S
    for name, result in results.items():
        num_bytes, packets = (
            late - early for late, early in zip(after[name], before[name], strict=True)
        )
        frames, payload = result["sent_bytes"], num_bytes - HEADER_BYTES * packets
        print(
            f"{name}: {result['seconds']:.1f} s (the bytes alone: {ideal_s:.0f} s); frames"
            f" {frames}, with TLS and HTTP/2 {payload} ({100 * (payload / frames - 1):+.2f} %),"
            f" with {packets} packets' headers {num_bytes} ({100 * (num_bytes / frames - 1):+.2f}"
            f" %); memory grew by {result['grown_bytes'] / 1e6:.1f} MB"
        )
        assert result["state"] == "committed", result["story"]
        assert result["links"] == 1, result["story"]  # it never broke
        assert payload == pytest.approx(frames, rel=0.03)  # law 8
        assert frames == pytest.approx(MESSAGE_BYTES, rel=0.001)
        assert result["grown_bytes"] <= 4 * MESSAGE_BYTES
        assert result["seconds"] < 1.5 * ideal_s


if __name__ == "__main__":
    node(sys.argv[1], Path(sys.argv[2]))
