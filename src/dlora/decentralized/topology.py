"""Which peers exchange in round t, and with which weights: neighbours, mixing matrix,
spectral gap.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import eye_array
from scipy.sparse.csgraph import breadth_first_order

from dlora.config.peers import TopologySection
from dlora.decentralized.finite_time import base_k, hypercube
from dlora.decentralized.graphs import joined
from dlora.decentralized.matrices import (
    ROUNDING,
    Ends,
    Matrix,
    Vector,
    check_mixing,
    disagreement,
    edges_of,
    largest_eigenvalue,
    matrix_of,
)
from dlora.errors import TopologyError

Weights = Literal["metropolis", "laplacian"]


@dataclass(frozen=True, eq=False)
class Topology:
    """The mixing matrices of a run, one for each round; after ``period`` rounds they start again.

    ``matrices``: (n, n) each, dense or sparse, row = receiver, symmetric and doubly stochastic.
    Raises TopologyError if one is not. Read-only copies are kept, as scipy's sparse arrays of
    float64. All methods depend on their arguments only.
    """

    kind: str
    names: tuple[str, ...]  # peers in order; the index is the peer_index
    matrices: tuple[Matrix, ...]
    by_degree: bool = False  # Metropolis weights, which follow from the degrees

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrices", tuple(map(check_mixing, self.matrices)))

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
        return float(1 - disagreement(self.matrices) ** (1 / self.period))

    def mixing(self, round: int) -> Matrix:
        """The sparse (n, n) mixing matrix of a round. Entry [i, j] is the weight that peer i gives
        to peer j; ``toarray()`` makes it dense.
        """
        return self.matrices[round % self.period]

    def neighbours(self, peer: int, round: int) -> dict[int, float]:
        """Neighbour -> neighbour weight of one peer in a round, without the peer itself.

        Empty if the peer exchanges with nobody in this round.
        """
        mixing = self.mixing(round)
        row = slice(*mixing.indptr[peer : peer + 2])
        weights = zip(mixing.indices[row].tolist(), mixing.data[row].tolist(), strict=True)
        return {other: weight for other, weight in weights if other != peer}

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

    @cached_property
    def parents(self) -> list[int | None]:
        """The parent of each peer in a breadth-first tree over the edges of all rounds; peer 0 is
        the root and has none.
        """
        return [None if parent < 0 else parent for parent in self._tree[1].tolist()]

    def tree(self, peer: int) -> tuple[int | None, dict[int, int]]:
        """The place of one peer in the tree of ``parents``.

        Returns its parent (None at the root), and for each child the number of peers below, the
        child included.
        """
        below = [1] * self.num_peers
        for one in reversed(self._tree[0].tolist()):  # children come before their parents
            if (parent := self.parents[one]) is not None:
                below[parent] += below[one]
        children = {one: below[one] for one, parent in enumerate(self.parents) if parent == peer}
        return self.parents[peer], children

    @cached_property
    def _tree(self) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]:
        """The peers from the root on, and for each peer its parent, or a number below 0."""
        order, parents = breadth_first_order(sum(self.matrices[1:], self.matrices[0]), 0)
        return order, parents

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
        there = np.zeros(self.num_peers, dtype=bool)
        there[list(peers)] = True
        ends, weights = edges_of(self.mixing(round))
        left = there[ends].all(axis=1)
        ends, weights = ends[left], weights[left]
        if self.by_degree:
            weights = _by_degree(_degrees(self.num_peers, ends), ends)
        kept = np.ones(self.num_peers)
        np.subtract.at(kept, ends.ravel(), np.repeat(weights, 2))
        return _pairs(ends), matrix_of(kept, ends, weights)

    @cached_property
    def _edges(self) -> list[list[tuple[int, int]]]:
        return [_pairs(edges_of(matrix)[0]) for matrix in self.matrices]


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
        return Topology(section.kind, tuple(names), tuple(cycle) or (eye_array(1),))
    ends = joined(section, names)
    by_degree = weights != "laplacian"
    mixing = _metropolis(n, ends) if by_degree else _laplacian(n, ends)
    return Topology(section.kind, tuple(names), (mixing,), by_degree)


# Weights


def _degrees(n: int, ends: Ends) -> NDArray[np.integer[Any]]:
    return np.bincount(ends.ravel(), minlength=n)


def _by_degree(degrees: NDArray[np.integer[Any]], ends: Ends) -> Vector:
    larger: Vector = degrees[ends].max(axis=1, initial=0).astype(np.float64)
    return 1 / (1 + larger)


def _pairs(ends: Ends) -> list[tuple[int, int]]:
    return [(i, j) for i, j in ends.tolist()]


def _metropolis(n: int, ends: Ends) -> Matrix:
    """W_ij = 1 / (1 + max(d_i, d_j)) (Xiao, Boyd & Lall 2005); d are the peers' degrees.

    A peer keeps 1 / (1 + d_i) and what its neighbours with a larger degree do not take. Computed in
    this way, a complete graph has exactly 1/n everywhere.
    """
    degrees = _degrees(n, ends)
    equal_share, weights = 1 / (1 + degrees), _by_degree(degrees, ends)
    kept = equal_share.copy()
    np.add.at(kept, ends.ravel(), (equal_share[ends] - weights[:, np.newaxis]).ravel())
    return matrix_of(kept, ends, weights)


def _laplacian(n: int, ends: Ends) -> Matrix:
    """I - 2 L / (3 lambda_max), the rule of the Dec-LoRA paper (arXiv 2501.15361).

    lambda_max is larger than the largest degree, so each peer keeps at least 1/3 and no weight is
    negative.
    """
    degrees = _degrees(n, ends)
    laplacian = matrix_of(degrees.astype(np.float64), ends, np.full(len(ends), -1.0))
    # for a single peer lambda_max is 0 and the Laplacian too
    weight = 2 / (3 * (largest_eigenvalue(laplacian) or 1.0))
    return matrix_of(1 - weight * laplacian.diagonal(), ends, np.full(len(ends), weight))


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
    # a cycle makes the distance (1 - gap)^period times smaller, and no round makes it larger
    cycles = 1 if gap == 1 else math.ceil(math.log(enough) / (topology.period * math.log1p(-gap)))
    rounds = 1 + bisect_left(
        range(1, cycles * topology.period),
        True,
        key=lambda rounds: disagreement([topology.mixing(one) for one in range(rounds)]) <= enough,
    )
    return rounds, sum(2 * len(topology.edges(round)) for round in range(rounds))
