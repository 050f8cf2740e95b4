"""Law 4: every mixing matrix is symmetric and doubly stochastic, and peers agree as fast as the
spectral gap says.
"""

import itertools
import math
from functools import reduce
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlora.config.peers import TopologySection
from dlora.decentralized.topology import (
    Topology,
    build_topology,
    rounds_to_agree,
    spectral_gap,
)
from kit.topologies import build

STATIC = ("ring", "complete", "erdos-renyi", "exponential", "edges")
quick = settings(deadline=None, derandomize=True, max_examples=60)


def offered(n: int) -> list[Topology]:
    """Everything a user can choose among n peers."""
    topologies = [
        build(kind, n, weights) for kind in STATIC for weights in (None, "metropolis", "laplacian")
    ]
    topologies += [build("base-k", n, k=k) for k in (1, 2, 3, 4)]
    return topologies + ([build("hypercube", n)] if n & (n - 1) == 0 else [])


def cycle_product(topology: Topology) -> np.ndarray:
    product = np.eye(topology.num_peers)
    for round in range(topology.period):
        product = topology.mixing(round) @ product
    return product


def dense(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.toarray())


def distance(values: np.ndarray) -> float:
    return float(np.linalg.norm(values - values.mean(axis=0)))


anything = st.integers(1, 24).flatmap(
    lambda n: st.sampled_from(range(len(offered(n)))).map(lambda at: offered(n)[at])
)
static = st.builds(
    build, st.sampled_from(STATIC), st.integers(2, 24), st.sampled_from(["metropolis", "laplacian"])
)


# --- symmetric, doubly stochastic, mean kept ---


@pytest.mark.parametrize("n", range(1, 41))
def test_every_offered_matrix_is_symmetric_and_doubly_stochastic(n: int) -> None:
    for topology in offered(n):
        assert topology.num_peers == n
        for mixing in map(dense, topology.matrices):
            assert mixing.shape == (n, n) and mixing.dtype == np.float64
            assert mixing.min() >= 0
            np.testing.assert_allclose(mixing, mixing.T, rtol=0, atol=1e-12)
            np.testing.assert_allclose(mixing.sum(axis=0), 1, rtol=0, atol=1e-12)
            np.testing.assert_allclose(mixing.sum(axis=1), 1, rtol=0, atol=1e-12)
            # nobody forgets its own, so a missing neighbour can be left out
            assert np.diag(mixing).min() > 0


@quick
@given(anything, st.integers(0, 2**32 - 1))
def test_mixing_keeps_the_mean_and_never_spreads_the_peers(topology: Topology, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(topology.num_peers, 3))
    mean, spread = values.mean(axis=0), distance(values)
    for round in range(topology.period):
        values = topology.mixing(round) @ values
        np.testing.assert_allclose(values.mean(axis=0), mean, atol=1e-12)
        assert distance(values) <= spread + 1e-12
        spread = distance(values)


@quick
@given(anything, st.integers(0, 50))
def test_neighbours_and_edges_say_what_the_matrix_says_and_repeat_after_a_period(
    topology: Topology, round: int
) -> None:
    rebuilt = np.zeros((topology.num_peers, topology.num_peers))
    for peer in range(topology.num_peers):
        neighbours = topology.neighbours(peer, round)
        assert peer not in neighbours and all(weight > 0 for weight in neighbours.values())
        rebuilt[peer, list(neighbours)] = list(neighbours.values())
        rebuilt[peer, peer] = 1 - sum(neighbours.values())
        assert (
            neighbours
            == topology.neighbours(peer, round + topology.period)
            == topology.neighbours(peer, round)
        )
    np.testing.assert_allclose(rebuilt, dense(topology.mixing(round)), atol=1e-12)
    directed = {(i, j) for i in range(topology.num_peers) for j in topology.neighbours(i, round)}
    edges = topology.edges(round)
    assert all(i < j for i, j in edges) and len(set(edges)) == len(edges)
    assert directed == {*edges, *((j, i) for i, j in edges)}


def test_matrices_cannot_be_changed_not_even_through_the_array_they_came_from() -> None:
    given_matrix = np.full((2, 2), 0.5)
    topology = Topology("by hand", ("ana", "bo"), (given_matrix,))
    given_matrix[0, 0] = 7
    assert topology.mixing(0)[0, 0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        topology.mixing(0)[0, 0] = 7


# --- the spectral gap is a promise ---


@quick
@given(static, st.integers(0, 2**32 - 1))
def test_distance_falls_at_least_as_the_gap_promises_and_exactly_so_in_the_worst_direction(
    topology: Topology, seed: int
) -> None:
    mixing, n = dense(topology.mixing(0)), topology.num_peers
    rate = 1 - spectral_gap(topology)
    values = np.random.default_rng(seed).normal(size=(n, 2))
    assert distance(mixing @ values) <= rate * distance(values) + 1e-12
    eigenvalues, vectors = np.linalg.eigh(mixing - 1 / n)
    worst = vectors[:, np.argmax(np.abs(eigenvalues))]
    assert distance(mixing @ worst) == pytest.approx(rate * distance(worst), abs=1e-12)


RING_GAPS = {
    "metropolis": {8: 0.195, 10: 0.127, 16: 0.051, 20: 0.033, 64: 0.0032},
    "laplacian": {8: 0.098, 10: 0.064, 16: 0.025, 20: 0.016, 64: 0.0016},
}


@pytest.mark.parametrize(
    ("weights", "n"), [(weights, n) for weights, gaps in RING_GAPS.items() for n in gaps]
)
def test_ring_gaps_computed_elsewhere(weights: Any, n: int) -> None:
    printed = RING_GAPS[weights][n]
    assert spectral_gap(build("ring", n, weights)) == pytest.approx(
        printed, abs=5.1e-4 if printed > 0.01 else 5.1e-5
    )


@pytest.mark.parametrize("n", range(3, 41))
def test_exponential_gap_is_that_of_its_circulant(n: int) -> None:
    hops = {sign * 2**k % n for k in range(math.ceil(math.log2(n))) for sign in (1, -1)}
    angles = 2 * np.pi * np.arange(1, n) / n
    eigenvalues = (1 + sum(np.cos(hop * angles) for hop in hops)) / (1 + len(hops))
    assert spectral_gap(build("exponential", n)) == pytest.approx(
        1 - np.abs(eigenvalues).max(), abs=1e-12
    )


def test_gap_of_rounds_that_differ_is_the_rate_a_round_over_the_cycle() -> None:
    pair, rest = np.full((2, 2), 0.5), np.eye(2)
    lazy = 0.25 * pair + 0.75 * rest  # its second eigenvalue is 0.75
    assert spectral_gap(Topology("by hand", ("ana", "bo"), (lazy, rest))) == pytest.approx(
        1 - math.sqrt(0.75)
    )


@pytest.mark.parametrize(
    ("kind", "n"), [("ring", 60), ("erdos-renyi", 60), ("base-k", 57), ("exponential", 60)]
)
def test_the_gap_is_what_a_singular_value_decomposition_gives(kind: str, n: int) -> None:
    topology = build(kind, n)
    # of a cycle: not exact, not symmetric
    part = Topology(kind, topology.names, topology.matrices[:-1] or topology.matrices)
    product = reduce(lambda done, mixing: mixing @ done, map(dense, part.matrices))
    largest = np.linalg.svd(product - 1 / n, compute_uv=False)[0]
    assert spectral_gap(part) == pytest.approx(1 - largest ** (1 / part.period), abs=1e-12)


# --- each kind is what its name says ---


@pytest.mark.parametrize("n", range(1, 41))
def test_complete_is_exactly_uniform(n: int) -> None:
    complete = build("complete", n)
    assert (dense(complete.mixing(0)) == 1 / n).all()
    assert spectral_gap(complete) == 1


@pytest.mark.parametrize(("n", "edges"), [(1, []), (2, [(0, 1)]), (3, [(0, 1), (0, 2), (1, 2)])])
def test_small_rings(n: int, edges: list[tuple[int, int]]) -> None:
    assert build("ring", n).edges(0) == edges


def test_ring_neighbours_have_a_third_each() -> None:
    ring = build("ring", 6)
    assert ring.neighbours(0, 0) == {1: 1 / 3, 5: 1 / 3}
    assert ring.mixing(0)[0, 0] == 1 / 3


def test_the_two_weight_rules_on_a_star() -> None:
    metropolis, laplacian = (
        dense(build("edges", 5, weights).mixing(0)) for weights in ("metropolis", "laplacian")
    )
    np.testing.assert_allclose(metropolis[:2, :2], [[0.2, 0.2], [0.2, 0.8]])
    edge = 2 / (3 * 5)  # the largest eigenvalue of a star's laplacian is its number of peers
    np.testing.assert_allclose(laplacian[:2, :2], [[1 - 4 * edge, edge], [edge, 1 - edge]])


def test_erdos_renyi_is_the_first_connected_graph_from_its_seed_on() -> None:
    def oracle(seed: int) -> "nx.Graph[int]":
        return next(
            g
            for s in itertools.count(seed)
            if nx.is_connected(g := nx.gnp_random_graph(12, 0.2, seed=s))
        )

    drawn = [build("erdos-renyi", 12, p=0.2, seed=seed).edges(0) for seed in range(20)]
    assert drawn == [sorted(oracle(seed).edges) for seed in range(20)]
    assert any(not nx.is_connected(nx.gnp_random_graph(12, 0.2, seed=seed)) for seed in range(20))
    assert len({tuple(edges) for edges in drawn}) > 5


def test_exponential_joins_hops_of_powers_of_two_both_ways() -> None:
    assert sorted(build("exponential", 16).neighbours(0, 0)) == [1, 2, 4, 8, 12, 14, 15]


def test_edges_by_name_and_by_index_are_the_same() -> None:
    section = TopologySection(kind="edges", edges=(("ana", "bo"), (1, "cy"), (2, 0)))
    assert build_topology(section, None, ["ana", "bo", "cy"]).edges(0) == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64])
def test_hypercube_pairs_across_one_bit_and_is_exact_after_its_cycle(n: int) -> None:
    hypercube = build("hypercube", n)
    assert hypercube.period == max(1, n.bit_length() - 1)
    if n > 1:
        for round, peer in itertools.product(range(2 * hypercube.period), range(n)):
            assert hypercube.neighbours(peer, round) == {
                peer ^ 2 ** (round % hypercube.period): 0.5
            }
    np.testing.assert_allclose(cycle_product(hypercube), 1 / n, atol=1e-14)
    assert spectral_gap(hypercube) == 1


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("n", range(1, 65))
def test_base_k_is_exact_after_its_cycle_for_any_number_of_peers(n: int, k: int) -> None:
    base_k = build("base-k", n, k=k)
    np.testing.assert_allclose(cycle_product(base_k), 1 / n, atol=1e-13)
    assert spectral_gap(base_k) == 1
    assert all(
        len(base_k.neighbours(peer, round)) <= k
        for peer in range(n)
        for round in range(base_k.period)
    )
    # Theorem 1 of the paper bounds the cycle of the simple graph; the one taken is never longer.
    assert base_k.period <= max(1, 2 * math.log(n, k + 1) + 2)


@pytest.mark.parametrize(
    ("k", "n", "rounds"),
    [
        (1, 10, 6),
        (1, 12, 5),
        (1, 20, 7),
        (1, 25, 9),
        (1, 50, 10),
        (1, 100, 11),
        (2, 10, 4),
        (2, 20, 5),
        (2, 100, 8),
    ],
)
def test_base_k_cycles_are_as_long_as_the_reference_code_gives(k: int, n: int, rounds: int) -> None:
    base_k = build("base-k", n, k=k)
    assert base_k.period == rounds
    assert rounds_to_agree(base_k, 1e12)[0] == rounds


def test_base_k_peers_whom_no_later_part_meets_still_mix_among_themselves() -> None:
    # 5 = 4 + 1: peer 4 meets one block of four
    assert build("base-k", 5).edges(2) == [(0, 4), (1, 2)]
    assert build("base-k", 11, k=2).edges(2) == [
        (0, 9),
        (1, 10),
        (2, 3),
        (2, 4),
        (3, 4),
        (5, 6),
        (5, 7),
        (6, 7),
    ]


# --- rounds and messages ---


@quick
@given(anything, st.sampled_from([2.0, 10.0, 100.0]))
def test_rounds_to_agree_is_what_multiplying_the_matrices_gives(
    topology: Topology, factor: float
) -> None:
    n, rounds, messages = topology.num_peers, 0, 0
    product = np.eye(n)
    while np.linalg.norm(product - 1 / n, 2) > (1 + 1e-8) / factor:
        mixing = dense(topology.mixing(rounds))
        product = mixing @ product
        messages += int(np.count_nonzero(mixing - np.diag(np.diag(mixing))))
        rounds += 1
    assert rounds_to_agree(topology, factor) == (rounds, messages)


def test_rounds_of_large_rings_cost_no_multiplication() -> None:
    rounds, messages = rounds_to_agree(build("ring", 64))
    assert messages == rounds * 64 * 2
    assert messages / 64 == pytest.approx(2864, abs=2)  # computed elsewhere, a round cut off
    assert rounds_to_agree(build("ring", 300), 1e6)[0] > 90_000


# --- what it is for ---


def optimise(topology: Topology, num_rounds: int, step_of: Any) -> float:
    """D-SGD on f_i(x) = a_i/2 |x - c_i|^2; the largest distance of a peer from the minimum of the
    sum.
    """
    n = topology.num_peers
    draw = np.random.default_rng(3)
    curvature, centres = draw.uniform(0.5, 2.0, size=(n, 1)), draw.normal(size=(n, 4))
    optimum = (curvature * centres).sum(axis=0) / curvature.sum()
    x = np.zeros((n, 4))
    for round in range(num_rounds):
        x = topology.mixing(round) @ (x - step_of(round) * curvature * (x - centres))
    return float(np.linalg.norm(x - optimum, axis=1).max())


@pytest.mark.parametrize(
    "topology", [build("ring", 10), build("base-k", 10)], ids=lambda topology: topology.kind
)
def test_gossip_with_a_decaying_step_reaches_the_optimum_of_the_sum(topology: Topology) -> None:
    def decaying(round: int) -> float:
        return 4 / (round + 10)

    early, late = optimise(topology, 500, decaying), optimise(topology, 8000, decaying)
    assert late < 5e-3
    assert late < early / 8  # the error falls with the step, as 1/t
    # a constant step stays off: peers differ
    assert optimise(topology, 8000, lambda round: 0.2) > 20 * late
