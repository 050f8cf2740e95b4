"""What mixing costs with many stacked peers, beside a plain `add_` over the same bytes."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from stacked_step import machine_facts, table

from dlora.config.peers import PeersSection, TopologySection
from dlora.decentralized.gossip import Gossip
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.topology import build_topology
from dlora.net.counting import MemoryTransport

TENSORS = 64  # of a peer, such as A and B of 32 modules
MAX_S, MAX_RATIO = 1.0, 3.0  # for 1,000 peers of 1 MiB, what the project promises


def main() -> None:
    """Measure both in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--kib", type=int, default=1024, help="size of one peer's factors")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--topology", default="ring", choices=["ring", "exponential", "hypercube", "base-k"]
    )
    arguments = parser.parse_args()
    peers, numbers = arguments.peers, arguments.kib * 256 // TENSORS
    factors = {f"t{number}": torch.randn(peers, numbers) for number in range(TENSORS)}
    more = {name: torch.randn(peers, numbers) for name in factors}
    names = [f"peer-{number}" for number in range(peers)]
    topology = build_topology(TopologySection(kind=arguments.topology), None, names)
    gossip = Gossip(factors, topology, build_rule(PeersSection()), MemoryTransport())
    losses = torch.zeros(peers)

    def mixed(round: int) -> None:
        gossip.round(round, lambda names: losses)

    def added(round: int) -> None:
        for name, tensor in factors.items():
            tensor.add_(more[name])

    took: dict[Callable[[int], None], list[float]] = {mixed: [], added: []}
    for round in range(arguments.pairs):
        for way, seconds in took.items():
            began_at = time.perf_counter()
            way(round)
            seconds.append(time.perf_counter() - began_at)
    ratio = statistics.median(one / other for one, other in zip(*took.values(), strict=True))
    print(machine_facts())
    print(f"\n{peers:,} peers on a {arguments.topology}, {arguments.kib} KiB each\n")
    rows = [
        [what, f"{1e3 * statistics.median(took[way]):.0f}"]
        for what, way in {"a round's mixing": mixed, "add_": added}.items()
    ]
    print(table(["", "ms, median"], rows))
    print(
        f"\nRatio {ratio:.2f} (median of pairs), target at most {MAX_RATIO:g};"
        f" for 1,000 peers of 1 MiB at most {MAX_S:g} s."
    )


if __name__ == "__main__":
    main()
