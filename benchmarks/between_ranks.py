"""What a round's exchange between the ranks of a simulation costs, beside bare isend and irecv of
the same bytes. Start it with torchrun.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from stacked_step import machine_facts, table

from dlora.config.peers import TopologySection
from dlora.decentralized.topology import build_topology
from dlora.net.between_ranks import BetweenRanks
from dlora.run.ranks import joined_ranks

TENSORS = 74  # of a peer, as with MiniLM
MAX_RATIO = 1.3  # what the project promises


def main() -> None:
    """Measure both in turns; the main rank prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=64)
    parser.add_argument("--kib", type=int, default=1024, help="size of one peer's factors")
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    ranks = joined_ranks()
    if ranks.group is None or ranks.size != 2:
        parser.error("start it with: torchrun --standalone --nproc-per-node 2")
    names = [f"peer-{number}" for number in range(arguments.peers)]
    section = TopologySection(kind="erdos-renyi", p=0.2)
    edges = build_topology(section, None, names).edges(0)
    blocks, numbers = ranks.blocks(arguments.peers), arguments.kib * 256 // TENSORS
    here = len(blocks[ranks.rank])
    sent = {f"t{number}": torch.randn(here, numbers) for number in range(TENSORS)}
    between = BetweenRanks(blocks, ranks.rank, ranks.group, torch.float32)
    between.carry(sent, edges, None)
    bytes_a_round, other = ranks.gathered(between.bytes_sent), 1 - ranks.rank
    outgoing = torch.randn(bytes_a_round[ranks.rank] // 4)
    incoming = torch.empty(bytes_a_round[other] // 4)

    def bare() -> None:
        operations = [
            dist.P2POp(dist.isend, outgoing, other, ranks.group),
            dist.P2POp(dist.irecv, incoming, other, ranks.group),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    ways: dict[str, Callable[[], object]] = {
        "a round's exchange": lambda: between.carry(sent, edges, None),
        "bare isend and irecv": bare,
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.pairs):
        for name, way in ways.items():
            dist.barrier(ranks.group)
            began_at = time.perf_counter()
            way()
            dist.barrier(ranks.group)
            took[name].append(time.perf_counter() - began_at)
    if not ranks.is_main:
        return
    ratio = statistics.median(one / other for one, other in zip(*took.values(), strict=True))
    print(machine_facts())
    sizes = " and ".join(f"{sent / 1e6:.1f} MB" for sent in bytes_a_round)
    print(
        f"\n{ranks.size} ranks, {arguments.peers} peers of {arguments.kib} KiB,"
        f" {sizes} from the ranks a round\n"
    )
    rows = [[name, f"{1e3 * statistics.median(seconds):.0f}"] for name, seconds in took.items()]
    print(table(["", "ms"], rows))
    print(f"\nratio {ratio:.2f} (at most {MAX_RATIO} is promised)")


if __name__ == "__main__":
    main()
