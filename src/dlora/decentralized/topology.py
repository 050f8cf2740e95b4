"""Which peers exchange in round t, and with which weights: neighbours, mixing matrix,
spectral gap.
"""

from __future__ import annotations

import difflib
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import combinations
from typing import Literal, get_args

import networkx as nx
import numpy as np

from dlora.config.run import TopologySection
from dlora.decentralized.finite_time import Matrix, base_k, hypercube
from dlora.decentralized.matrices import ROUNDING, check_mixing, disagreement
from dlora.errors import TopologyError

Weights = Literal["metropolis", "laplacian"]

ERDOS_RENYI_TRIES = 1000  # number of seeds that are tried for a connected graph


@dataclass(frozen=True, eq=False)
class Topology:
    """The mixing matrices of a run, one for each round; after ``period`` rounds they start again.

    ``matrices``: (n, n) float64 each, row = receiver, symmetric and doubly stochastic, kept as
    read-only copies. Raises TopologyError if one is not. All methods depend on their arguments
    only.
    """

    kind: str
    names: tuple[str, ...]  # peers in order; the index is the peer_index
    matrices: tuple[Matrix, ...]
    by_degree: bool = False  # Metropolis weights, which follow from the degrees

    def __post_init__(self) -> None:
        copies = tuple(np.array(matrix, dtype=np.float64) for matrix in self.matrices)
        for matrix in copies:
            check_mixing(matrix)
            matrix.flags.writeable = False
        object.__setattr__(self, "matrices", copies)

    @property
    def period(self) -> int:
        """Rounds until the matrices repeat; 1 if every round is the same."""
        return len(self.matrices)

    @property
    def num_peers(self) -> int:
        """The number of peers."""
        return len(self.names)

    @cached_property
    def spectral_gap(self) -> float:
        """The value of `spectral_gap`, computed once."""
        if self.period > 1 and self._agrees_in_one_cycle():
            return 1.0
        product = reduce(lambda done, mixing: mixing @ done, self.matrices)
        return float(1 - disagreement(product) ** (1 / self.period))

    def _agrees_in_one_cycle(self) -> bool:
        """Whether a cycle takes random values to their mean, and so any values; n^2 a round and not
        n^3.
        """
        values = np.random.default_rng(0).standard_normal((self.num_peers, 4))
        mixed = reduce(lambda done, mixing: mixing @ done, self.matrices, values)
        return bool(np.abs(mixed - values.mean(axis=0)).max() <= ROUNDING)

    def mixing(self, round: int) -> Matrix:
        """The (n, n) mixing matrix of a round. Entry [i, j] is the weight that peer i gives to peer
        j.
        """
        return self.matrices[round % self.period]

    def neighbours(self, peer: int, round: int) -> dict[int, float]:
        """Neighbour -> neighbour weight of one peer in a round, without the peer itself.

        Empty if the peer exchanges with nobody in this round.
        """
        row = self.mixing(round)[peer]
        return {int(j): float(row[j]) for j in np.flatnonzero(row) if j != peer}

    def all_neighbours(self, peer: int) -> list[int]:
        """The peers that are a neighbour of ``peer`` in some round, in order."""
        return sorted(
            {other for round in range(self.period) for other in self.neighbours(peer, round)}
        )

    def neighbour_names(self, name: str) -> list[str]:
        """The names of the peers that are a neighbour of ``name`` in some round, in order."""
        return [self.names[other] for other in self.all_neighbours(self.names.index(name))]

    def named_pairs(self) -> set[tuple[str, str]]:
        """The names of every two peers that are neighbours in some round."""
        edges = (edge for round in range(self.period) for edge in self.edges(round))
        return {(self.names[one], self.names[two]) for one, two in edges}

    def tree(self, peer: int) -> tuple[int | None, dict[int, int]]:
        """The place of one peer in a breadth-first tree over the edges of all rounds; peer 0 is the
        root.

        Returns its parent (None at the root), and for each child the number of peers below, the
        child included.
        """
        graph = nx.Graph(edge for round in range(self.period) for edge in self.edges(round))
        graph.add_nodes_from(range(self.num_peers))
        tree = nx.bfs_tree(graph, 0, sort_neighbors=sorted)
        below = {
            child: 1 + len(nx.descendants(tree, child)) for child in sorted(tree.successors(peer))
        }
        return next(iter(tree.predecessors(peer)), None), below

    def edges(self, round: int) -> list[tuple[int, int]]:
        """The pairs (i, j), i < j, that exchange in a round; each exchange is two messages."""
        return self._edges[round % self.period]

    def edges_among(self, peers: Sequence[int], round: int) -> list[tuple[int, int]]:
        """The edges of a round of which both ends are among ``peers``."""
        if len(peers) == self.num_peers:
            return self.edges(round)
        there = set(peers)
        return [(i, j) for i, j in self.edges(round) if i in there and j in there]

    def among(self, peers: Sequence[int], round: int) -> tuple[list[tuple[int, int]], Matrix]:
        """The edges of a round and its mixing matrix when only ``peers`` take part.

        An edge needs both its ends. Metropolis weights are those of the graph that is left, so a
        complete graph gives the mean of those who take part. Other weights stay, and a peer keeps
        the weight of a neighbour that is not there. So the matrix is symmetric and doubly
        stochastic.
        """
        edges = self.edges_among(peers, round)
        degree = Counter(end for edge in edges for end in edge)
        whole, mixing = self.mixing(round), np.zeros((self.num_peers, self.num_peers))
        kept = np.ones(self.num_peers)
        for i, j in edges:
            weight = 1 / (1 + max(degree[i], degree[j])) if self.by_degree else whole[i, j]
            mixing[i, j] = mixing[j, i] = weight
            kept[[i, j]] -= weight
        np.fill_diagonal(mixing, kept)
        return edges, mixing

    @cached_property
    def _edges(self) -> list[list[tuple[int, int]]]:
        return [
            [(int(i), int(j)) for i, j in np.argwhere(matrix) if i < j] for matrix in self.matrices
        ]


def build_topology(
    section: TopologySection, weights: Weights | None, names: Sequence[str]
) -> Topology:
    """The topology that a config asks for among the peers ``names``.

    ``weights`` None: metropolis, or the weights that the kind fixes. Raises TopologyError if there
    are no peers, the kind cannot serve their number, the weights or an edge are wrong, or the graph
    is not connected.
    """
    n = len(names)
    if n == 0:
        raise TopologyError(f"topology {section.kind} was asked for 0 peers; it takes at least 1")
    if weights not in (None, *get_args(Weights)):
        raise TopologyError(
            f"weights {weights}: no such rule; take one of {', '.join(get_args(Weights))}, or none"
        )
    if section.kind in ("hypercube", "base-k"):
        if weights is not None:
            raise TopologyError(
                f"weights {weights}: topology {section.kind} fixes its weights; remove the key"
                " weights"
            )
        cycle = hypercube(n) if section.kind == "hypercube" else base_k(n, section.k or 1)
        # a single peer has no neighbour, and its cycle is empty
        return Topology(section.kind, tuple(names), tuple(cycle) or (np.eye(1),))
    graph = _graph(section, names)
    if not nx.is_connected(graph):
        islands = [
            some_names([names[i] for i in sorted(island)], 4)
            for island in nx.connected_components(graph)
        ]
        apart = some_names([f"{{{island}}}" for island in islands], 4, " | ")
        raise TopologyError(
            f"topology {section.kind} is not connected: {apart}; join them by edges"
        )
    by_degree = weights != "laplacian"
    mixing = _metropolis(graph) if by_degree else _laplacian(graph)
    return Topology(section.kind, tuple(names), (mixing,), by_degree)


# Graphs that are the same in every round


def _graph(section: TopologySection, names: Sequence[str]) -> nx.Graph[int]:
    n = len(names)
    match section.kind:
        case "ring":
            pairs = [(i, (i + 1) % n) for i in range(n)]
        case "complete":
            pairs = list(combinations(range(n), 2))
        # symmetric form of Ying et al. 2021, arXiv 2110.13363: hops of 1, 2, 4, ... both ways
        case "exponential":
            pairs = [(i, (i + 2**hop) % n) for i in range(n) for hop in range((n - 1).bit_length())]
        case "erdos-renyi":
            pairs = _erdos_renyi(n, section.p or 0.0, section.seed or 0)
        case _:
            pairs = _given_pairs(section.edges or (), names)
    return _joined(n, pairs)


def _joined(n: int, pairs: Iterable[tuple[int, int]]) -> nx.Graph[int]:
    graph: nx.Graph[int] = nx.empty_graph(n)
    # in a ring of one peer, both ends are the same peer
    graph.add_edges_from((i, j) for i, j in pairs if i != j)
    return graph


def _erdos_renyi(n: int, p: float, seed: int) -> list[tuple[int, int]]:
    """Each pair is an edge with probability p; the first connected graph of the seeds from ``seed``
    on.

    Raises TopologyError if none of ``ERDOS_RENYI_TRIES`` graphs is connected.
    """
    for attempt in range(seed, seed + ERDOS_RENYI_TRIES):
        # Python gives the same sequence in every version, so all peers draw the same graph
        draw = random.Random(attempt).random
        pairs = [pair for pair in combinations(range(n), 2) if draw() < p]
        if len(pairs) >= n - 1 and nx.is_connected(_joined(n, pairs)):
            return pairs
    asked = f"topology erdos-renyi with p {p:g} and {n} peers"
    threshold = f"take p well above ln(n)/n = {math.log(n) / n:.2g}"
    raise TopologyError(
        f"{asked}: none of {ERDOS_RENYI_TRIES} graphs from seed {seed} on is connected; {threshold}"
    )


def _given_pairs(
    edges: Sequence[tuple[str | int, str | int]], names: Sequence[str]
) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for position, edge in enumerate(edges):
        where = f"topology.edges[{position}] is [{edge[0]}, {edge[1]}]"
        i, j = sorted(_peer_index(end, names, where) for end in edge)
        if i == j:
            raise TopologyError(
                f"{where}: a peer is not its own neighbour; remove it or name two peers"
            )
        if (i, j) in pairs:
            raise TopologyError(
                f"{where}: topology.edges[{pairs.index((i, j))}] joins these two already;"
                " remove one"
            )
        pairs.append((i, j))
    return pairs


def _peer_index(end: str | int, names: Sequence[str], where: str) -> int:
    if isinstance(end, int):
        if 0 <= end < len(names):
            return end
        hint = (
            f'write "{end}" in quotes to mean the peer of that name'
            if str(end) in names
            else "indices count from 0"
        )
        raise TopologyError(
            f"{where}: no peer has index {end}, there are {len(names)} peers; {hint}"
        )
    if end in names:
        return list(names).index(end)
    near = difflib.get_close_matches(end, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"peers: {some_names(names)}"
    raise TopologyError(f"{where}: no peer is named {end}; {hint}")


def some_names(words: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """The words, joined by ``between``; if there are more than ``most``, the first of them and
    their number.
    """
    shown = words if len(words) <= most else [*words[: most - 1], f"... ({len(words)} in all)"]
    return between.join(shown)


def _metropolis(graph: nx.Graph[int]) -> Matrix:
    """W_ij = 1 / (1 + max(d_i, d_j)) (Xiao, Boyd & Lall 2005); d are the peers' degrees.

    A peer keeps 1 / (1 + d_i) and what its neighbours with a larger degree do not take. Computed in
    this way, a complete graph has exactly 1/n everywhere.
    """
    mixing = np.zeros((len(graph), len(graph)))
    degree = dict(graph.degree)
    for i in graph:
        equal_share = 1 / (1 + degree[i])
        mixing[i, i] = equal_share
        for j in graph[i]:
            mixing[i, j] = 1 / (1 + max(degree[i], degree[j]))
            mixing[i, i] += equal_share - mixing[i, j]
    return mixing


def _laplacian(graph: nx.Graph[int]) -> Matrix:
    """I - 2 L / (3 lambda_max), the rule of the Dec-LoRA paper (arXiv 2501.15361).

    lambda_max is larger than the largest degree, so each peer keeps at least 1/3 and no weight is
    negative.
    """
    adjacency: Matrix = nx.to_numpy_array(graph, nodelist=range(len(graph)))
    laplacian = np.diag(adjacency.sum(axis=1)) - adjacency
    # for a single peer lambda_max is 0 and the Laplacian too
    lambda_max = float(np.linalg.eigvalsh(laplacian)[-1]) or 1.0
    return np.eye(len(graph)) - 2 / (3 * lambda_max) * laplacian


# Properties of a topology


def spectral_gap(topology: Topology) -> float:
    """1 - second largest absolute eigenvalue: 0 means that the peers never agree, 1 that they agree
    exactly.

    If rounds differ: 1 - |W_(T-1) ... W_0 - J|_2 ^ (1/T) over a cycle of T rounds; every entry of J
    is 1/n.
    """
    return topology.spectral_gap


def rounds_to_agree(topology: Topology, factor: float = 100.0) -> tuple[int, int]:
    """How many rounds, and messages of all peers, make the distance to the mean ``factor`` times
    smaller.

    The distance is the norm (not its square), from the worst start. An exchange over an edge is two
    messages. Raises TopologyError if the peers never agree.
    """
    enough = (1 + 1e-9) / factor  # equality up to rounding counts as reached
    gap = spectral_gap(topology)
    if gap <= ROUNDING:
        raise TopologyError(
            f"topology {topology.kind} never agrees: its spectral gap is 0; join all peers by edges"
        )
    if topology.num_peers == 1:
        return 0, 0
    if topology.period == 1:  # symmetric, so |W^t - J|_2 = |W - J|_2^t
        rounds = 1 if gap >= 1 - enough else math.ceil(math.log(enough) / math.log1p(-gap))
        return rounds, rounds * 2 * len(topology.edges(0))
    rounds = messages = 0
    product = np.eye(topology.num_peers)
    while disagreement(product) > enough:
        product = topology.mixing(rounds) @ product
        messages += 2 * len(topology.edges(rounds))
        rounds += 1
    return rounds, messages
