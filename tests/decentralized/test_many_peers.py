"""Many peers: topologies take what their edges take, and say the same as whole arrays do."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from functools import reduce
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.decentralized import matrices
from dlora.decentralized.matrices import disagreement, edges_of
from dlora.decentralized.topology import Topology, rounds_to_agree, spectral_gap
from kit.topologies import build

KINDS = ("ring", "complete", "erdos-renyi", "exponential", "edges", "base-k")


def some_tree(n: int) -> list[tuple[int, int]]:
    draw = random.Random(n)
    return [(draw.randrange(peer), peer) for peer in range(1, n)]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.sampled_from(KINDS), st.integers(1, 30), st.randoms(use_true_random=False))
def test_whole_arrays_and_sparse_ones_make_the_same_topology(
    kind: str, n: int, draw: random.Random
) -> None:
    built = build(kind, n)
    wholes = tuple(matrix.toarray() for matrix in built.matrices)
    again = Topology(kind, built.names, wholes, built.by_degree)
    there = sorted(draw.sample(range(n), draw.randint(1, n)))
    for round, whole in enumerate(wholes):
        assert (again.mixing(round).toarray() == whole).all()
        assert again.edges(round) == [(i, j) for i, j in np.argwhere(whole) if i < j]
        ends, weights = edges_of(built.mixing(round))
        assert (weights == whole[ends[:, 0], ends[:, 1]]).all()
        edges, mixing = again.among(there, round)
        assert edges == again.edges_among(there, round) == built.among(there, round)[0]
        assert (mixing.toarray() == built.among(there, round)[1].toarray()).all()
    assert spectral_gap(again) == spectral_gap(built)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_that_of_another_library(kind: str) -> None:
    keys: dict[str, Any] = {"edges": some_tree(23)} if kind == "edges" else {}
    topology = build(kind, 23, **keys)
    graph = nx.Graph(edge for round in range(topology.period) for edge in topology.edges(round))
    tree = nx.bfs_tree(graph, 0, sort_neighbors=sorted)
    for peer in range(23):
        below = {
            child: 1 + len(nx.descendants(tree, child)) for child in sorted(tree.successors(peer))
        }
        assert topology.tree(peer) == (next(iter(tree.predecessors(peer)), None), below)
        assert topology.parents[peer] == topology.tree(peer)[0]


@pytest.mark.parametrize("weights", ["metropolis", "laplacian"])
@pytest.mark.parametrize("kind", ["tree", "star", "path", "erdos-renyi", "ring", "exponential"])
def test_iterations_find_the_gap_that_whole_arrays_give(
    kind: str, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges = {"tree": some_tree(400), "path": list(itertools.pairwise(range(400)))}
    keys: dict[str, Any] = {"edges": edges[kind]} if kind in edges else {}
    kind = "edges" if kind in ("tree", "star", "path") else kind
    exactly = build(kind, 400, weights, **keys)
    monkeypatch.setattr(matrices, "EXACT", 100)
    iterated = build(kind, 400, weights, **keys)
    for round in range(exactly.period):
        difference = (exactly.mixing(round) - iterated.mixing(round)).toarray()
        assert np.abs(difference).max() <= 1e-12
    values = np.linalg.eigvalsh(exactly.mixing(0).toarray() - 1 / 400)
    assert spectral_gap(iterated) == pytest.approx(1 - np.abs(values).max(), rel=1e-7)


@pytest.mark.parametrize("n", [128, 201])
def test_iterations_find_the_norm_of_each_part_of_a_cycle(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cycle = (*build("base-k", n).matrices[1:], build("erdos-renyi", n).mixing(0))
    wholes = [
        disagreement(cycle[start:end])
        for start, end in itertools.combinations(range(len(cycle) + 1), 2)
    ]
    rounds = rounds_to_agree(Topology("by hand", tuple(map(str, range(n))), cycle))
    monkeypatch.setattr(matrices, "EXACT", 100)
    assert wholes == pytest.approx(
        [
            disagreement(cycle[start:end])
            for start, end in itertools.combinations(range(len(cycle) + 1), 2)
        ],
        abs=1e-10,
    )
    assert rounds_to_agree(Topology("by hand", tuple(map(str, range(n))), cycle)) == rounds
    product = reduce(lambda done, mixing: mixing @ done, cycle, np.eye(n))
    assert disagreement(cycle) == pytest.approx(np.linalg.norm(product - 1 / n, 2), abs=1e-10)


@pytest.mark.parametrize(
    ("kind", "n"),
    [("ring", 10_000), ("exponential", 10_000), ("base-k", 10_000), ("hypercube", 8192)],
)
def test_ten_thousand_peers_take_megabytes(kind: str, n: int) -> None:
    tracemalloc.start()
    try:
        topology = build(kind, n)
        gap = spectral_gap(topology)
        rounds_to_agree(topology)
        topology.among(range(0, n, 2), 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80e6  # one whole array takes 537 or 800 MB
    assert (gap == 1) == (kind in ("base-k", "hypercube"))
