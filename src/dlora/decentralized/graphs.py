"""Which peers have an edge in a graph that is the same in every round, and whether they are all
joined.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dlora.config.peers import TopologySection
from dlora.decentralized.matrices import Ends, Vector
from dlora.errors import TopologyError

ERDOS_RENYI_TRIES = 1000  # number of seeds that are tried for a connected graph


def joined(section: TopologySection, names: Sequence[str]) -> Ends:
    """The edges that a config asks for among the peers ``names``, each once.

    Raises TopologyError if an edge is wrong or the graph is not connected.
    """
    ends = _distinct(len(names), _ends(section, names))
    number, island_of = _islands(len(names), ends)
    if number > 1:
        islands = [
            some_names([names[peer] for peer in np.flatnonzero(island_of == island).tolist()], 4)
            for island in range(number)
        ]
        apart = some_names([f"{{{island}}}" for island in islands], 4, " | ")
        raise TopologyError(
            f"topology {section.kind} is not connected: {apart}; join them by edges"
        )
    return ends


def _ends(section: TopologySection, names: Sequence[str]) -> ArrayLike:
    """The two peers of each edge. An edge may come twice, and a peer may come as its own
    neighbour.
    """
    n = len(names)
    peers = np.arange(n)
    match section.kind:
        case "ring":
            return np.column_stack([peers, (peers + 1) % n])
        case "complete":
            return np.column_stack(np.triu_indices(n, 1))
        # symmetric form of Ying et al. 2021, arXiv 2110.13363: hops of 1, 2, 4, ... both ways
        case "exponential":
            hops = 2 ** np.arange((n - 1).bit_length())
            return np.column_stack(
                [np.repeat(peers, len(hops)), np.add.outer(peers, hops).ravel() % n]
            )
        case "erdos-renyi":
            return _erdos_renyi(n, section.p or 0.0, section.seed or 0)
        case _:
            return _given_pairs(section.edges or (), names)


def _distinct(n: int, ends: ArrayLike) -> Ends:
    """Each edge once, in the order in which they first come, without edges of a peer to itself."""
    pairs = np.sort(np.asarray(ends, dtype=np.int64).reshape(-1, 2), axis=1)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    _, firsts = np.unique(pairs @ (n, 1), return_index=True)
    distinct: Ends = pairs[np.sort(firsts)]
    return distinct


def _islands(n: int, ends: Ends) -> tuple[int, NDArray[np.integer[Any]]]:
    """How many parts of the graph are not joined, and the part of each peer, counted from 0."""
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(n, n))
    number, island_of = connected_components(graph, directed=False)
    return number, island_of


def _erdos_renyi(n: int, p: float, seed: int) -> Ends:
    """Each pair is an edge with probability p; the first connected graph of the seeds from ``seed``
    on.

    Raises TopologyError if none of ``ERDOS_RENYI_TRIES`` graphs is connected.
    """
    for attempt in range(seed, seed + ERDOS_RENYI_TRIES):
        draw = _python_draws(attempt)
        rows = [1 + one + np.flatnonzero(draw(n - 1 - one) < p) for one in range(n)]
        ends = np.column_stack(
            [np.repeat(np.arange(n), list(map(len, rows))), np.concatenate(rows)]
        )
        if len(ends) >= n - 1 and _islands(n, ends)[0] == 1:
            return ends
    asked = f"topology erdos-renyi with p {p:g} and {n} peers"
    threshold = f"take p well above ln(n)/n = {math.log(n) / n:.2g}"
    raise TopologyError(
        f"{asked}: none of {ERDOS_RENYI_TRIES} graphs from seed {seed} on is connected; {threshold}"
    )


def _python_draws(seed: int) -> Callable[[int], Vector]:
    """A function of a number: so many values of ``random.Random(seed).random()``, from where the
    last call ended.

    Python and numpy promise that this sequence never changes, so all peers draw the same graph.
    """
    _, (*key, position), _ = random.Random(seed).getstate()
    numbers = np.random.RandomState()
    numbers.set_state(("MT19937", np.array(key, dtype=np.uint32), position, 0, 0.0))
    return numbers.random_sample


def _given_pairs(
    edges: Sequence[tuple[str | int, str | int]], names: Sequence[str]
) -> list[tuple[int, int]]:
    indices = {name: index for index, name in enumerate(names)}
    pairs: dict[tuple[int, int], int] = {}  # and their positions
    for position, edge in enumerate(edges):
        where = f"topology.edges[{position}] is [{edge[0]}, {edge[1]}]"
        i, j = sorted(_peer_index(end, indices, where) for end in edge)
        if i == j:
            raise TopologyError(
                f"{where}: a peer is not its own neighbour; remove it or name two peers"
            )
        if (i, j) in pairs:
            raise TopologyError(
                f"{where}: topology.edges[{pairs[i, j]}] joins these two already; remove one"
            )
        pairs[i, j] = position
    return list(pairs)


def _peer_index(end: str | int, indices: Mapping[str, int], where: str) -> int:
    if isinstance(end, int):
        if 0 <= end < len(indices):
            return end
        hint = (
            f'write "{end}" in quotes to mean the peer of that name'
            if str(end) in indices
            else "indices count from 0"
        )
        raise TopologyError(
            f"{where}: no peer has index {end}, there are {len(indices)} peers; {hint}"
        )
    if end in indices:
        return indices[end]
    near = difflib.get_close_matches(end, indices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"peers: {some_names(list(indices))}"
    raise TopologyError(f"{where}: no peer is named {end}; {hint}")


def some_names(words: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """The words, joined by ``between``; if there are more than ``most``, the first of them and
    their number.
    """
    shown = words if len(words) <= most else [*words[: most - 1], f"... ({len(words)} in all)"]
    return between.join(shown)
