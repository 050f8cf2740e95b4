"""A topology in words: neighbours and weights as a table, and how fast peers agree."""

from __future__ import annotations

from typing import Any

from dlora.decentralized.graphs import some_names
from dlora.decentralized.matrices import ROUNDING
from dlora.decentralized.topology import Topology, rounds_to_agree, spectral_gap
from dlora.show.words import count_text

# of a description, in characters and rows; of more peers only half of that is shown
MAX_WIDTH, MAX_PEERS = 100, 16


def describe(topology: Topology) -> str:
    """A table of neighbours and weights, a column a round of the cycle; then spectral gap, rounds
    and messages.
    """
    n, period = topology.num_peers, topology.period
    when = "the same in every round" if period == 1 else f"a cycle of {period} rounds"
    lines = [f"{topology.kind}, {n} peer{'s' * (n > 1)}, {when}", ""]
    shown = range(n if n <= MAX_PEERS else MAX_PEERS // 2)
    heads = ["", *(topology.names[peer] for peer in shown)]
    columns = [
        [
            "neighbours (weight)" if period == 1 else f"round {round}",
            *(_cell(topology, peer, round) for peer in shown),
        ]
        for round in range(period)
    ]
    while columns:
        table = [heads, columns.pop(0)]
        while (
            columns
            and sum(3 + max(map(len, column)) for column in [*table, columns[0]]) <= MAX_WIDTH + 3
        ):
            table.append(columns.pop(0))
        widths = [max(map(len, column)) for column in table]
        for row in zip(*table, strict=True):
            lines.append(
                "   ".join(
                    cell.ljust(width) for cell, width in zip(row, widths, strict=True)
                ).rstrip()
            )
        lines += [f"... and {n - len(shown)} more peers"] * (len(shown) < n) + [""]
    gap = spectral_gap(topology)
    lines.append(f"spectral gap                   {gap:.3g}")
    goals = {"rounds to 100 times closer": 100.0} | (
        {"rounds to the exact average": 1 / ROUNDING} if gap == 1 else {}
    )
    for goal, factor in goals.items():
        rounds, messages = rounds_to_agree(topology, factor)
        lines.append(
            f"{goal:<30} {rounds:,} ({messages:,} messages, {count_text(messages / n)} a peer)"
        )
    return "\n".join(lines)


def as_figures(topology: Topology) -> dict[str, Any]:
    """The same as data for programs: for each round of the cycle the neighbours with their weights,
    then the figures.
    """
    rounds, messages = rounds_to_agree(topology)
    peers = range(topology.num_peers)
    return {
        "neighbours": [
            [topology.neighbours(peer, round) for peer in peers] for round in range(topology.period)
        ],
        "spectral_gap": spectral_gap(topology),
        "rounds_to_agree": rounds,
        "messages_to_agree": messages,
    }


def _cell(topology: Topology, peer: int, round: int) -> str:
    """Neighbours of equal weight together: ``ana, bo (0.333)``; a peer that rests in this round has
    a dash.
    """
    by_weight: dict[str, list[str]] = {}
    for neighbour, weight in topology.neighbours(peer, round).items():
        by_weight.setdefault(f"{weight:.3g}", []).append(topology.names[neighbour])
    return (
        "; ".join(f"{some_names(group, 6)} ({weight})" for weight, group in by_weight.items())
        or "-"
    )
