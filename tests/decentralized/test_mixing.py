"""Mixing: the difference form keeps the mean whoever is missing, and the rules train and send what
their papers say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlora.config.peers import PeersSection, TopologySection
from dlora.decentralized.gossip import Edge, Gossip
from dlora.decentralized.mixing import build_rule, mix, mix_edge
from dlora.decentralized.topology import build_topology
from dlora.lora.factors import average, consensus_distance
from dlora.net.counting import MemoryTransport
from dlora.wire.tensors import encode

NAMES = ("layer.lora_A", "layer.lora_B", "classifier.weight")


def some_factors(num_peers: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(num_peers, 3, 4, generator=generator, dtype=torch.float64)
        for name in NAMES
    }


class Lossy(MemoryTransport):
    """Some edges of some rounds are not committed."""

    def __init__(self, missing: set[tuple[int, int, int]]) -> None:
        super().__init__()
        self.missing = missing

    def exchange(
        self,
        round: int,
        sent: Mapping[str, Tensor],
        edges: Sequence[Edge],
        names: Sequence[Collection[str]] | None = None,
    ) -> tuple[list[Edge], dict[str, tuple[Sequence[int], Tensor]]]:
        committed, received = super().exchange(round, sent, edges, names)
        return [edge for edge in committed if (round, *edge) not in self.missing], received


def train_nothing(names: frozenset[str]) -> Tensor:
    return torch.zeros(1)


@given(
    num_peers=st.integers(2, 9),
    kind=st.sampled_from(["ring", "complete", "exponential", "base-k"]),
    data=st.data(),
)
def test_the_mean_is_kept_whichever_edges_are_missing(
    num_peers: int, kind: str, data: st.DataObject
) -> None:
    topology = build_topology(TopologySection(kind=kind), None, [str(i) for i in range(num_peers)])
    exchanges = [(round, *edge) for round in range(4) for edge in topology.edges(round)]
    missing = {exchange for exchange in exchanges if data.draw(st.booleans(), label=f"{exchange}")}
    factors = some_factors(num_peers)
    before, distance = average(factors), consensus_distance(factors)
    gossip = Gossip(factors, topology, build_rule(PeersSection()), Lossy(missing), torch.float64)
    for round in range(4):
        gossip.round(round, train_nothing)
    for name, tensor in average(factors).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-14)
    assert consensus_distance(factors) <= distance * (1 + 1e-12)  # and nobody drifts away


@given(
    num_peers=st.integers(2, 7),
    kind=st.sampled_from(["ring", "exponential", "base-k"]),
    data=st.data(),
)
def test_peers_with_other_units_active_mix_what_both_have_and_keep_the_mean(
    num_peers: int, kind: str, data: st.DataObject
) -> None:
    """Against each peer by itself, edge by edge; who does not send a tensor keeps it to the bit,
    and so does the wire.
    """
    topology = build_topology(TopologySection(kind=kind), None, [str(i) for i in range(num_peers)])
    names = [
        data.draw(st.sets(st.sampled_from(NAMES)), label=f"active at {peer}")
        for peer in range(num_peers)
    ]
    factors, wire = some_factors(num_peers), MemoryTransport(torch.float64)
    before = {name: tensor.clone() for name, tensor in factors.items()}
    Gossip(factors, topology, build_rule(PeersSection()), wire, torch.float64, lambda: names).round(
        0, train_nothing
    )
    for name, tensor in average(factors).items():
        torch.testing.assert_close(tensor, average(before)[name], rtol=0, atol=1e-14)
    messages = [
        {name: before[name][peer : peer + 1] for name in NAMES if name in names[peer]}
        for peer in range(num_peers)
    ]
    for peer in range(num_peers):
        alone = {name: tensor[peer : peer + 1].clone() for name, tensor in before.items()}
        for other in topology.neighbours(peer, 0):
            mix_edge(alone, float(topology.mixing(0)[peer, other]), messages[peer], messages[other])
        for name in NAMES:
            torch.testing.assert_close(factors[name][peer], alone[name][0], rtol=0, atol=1e-14)
            assert name in names[peer] or torch.equal(factors[name][peer], before[name][peer])
    one = [{name: tensor[0] for name, tensor in message.items()} for message in messages]
    assert wire.bytes_on_wire == sum(
        len(encode(one[end], torch.float64)) for edge in topology.edges(0) for end in edge
    )


def test_a_missing_neighbour_adds_nothing_and_its_edge_alone_is_left_out() -> None:
    """A ring of four in which the exchange 0-1 of the round fails: each peer's new value by
    hand.
    """
    topology = build_topology(TopologySection(kind="ring"), None, "abcd")
    factors = some_factors(4)
    x = {name: tensor.clone() for name, tensor in factors.items()}
    Gossip(factors, topology, build_rule(PeersSection()), Lossy({(0, 0, 1)}), torch.float64).round(
        0, train_nothing
    )
    for name in NAMES:
        a, b, c, d = x[name]
        new = [
            a + (d - a) / 3,
            b + (c - b) / 3,
            c + (b - c) / 3 + (d - c) / 3,
            d + (c - d) / 3 + (a - d) / 3,
        ]
        by_hand = torch.stack(new)
        torch.testing.assert_close(factors[name], by_hand, rtol=0, atol=1e-14)


@given(num_peers=st.integers(1, 12), p=st.floats(0.3, 1.0), seed=st.integers(0, 99))
def test_mixing_all_peers_at_once_is_the_matrix_product(
    num_peers: int, p: float, seed: int
) -> None:
    """The maths written twice: the difference form against x <- W x (Dec-LoRA, Algorithm 1)."""
    section = TopologySection(kind="erdos-renyi", p=p, seed=seed)
    topology = build_topology(section, None, [str(i) for i in range(num_peers)])
    factors = some_factors(num_peers, seed)
    mixing = torch.from_numpy(topology.mixing(0).toarray())
    expected = {
        name: torch.einsum("ij,j...->i...", mixing, tensor) for name, tensor in factors.items()
    }
    mix(
        factors,
        {name: tensor.clone() for name, tensor in factors.items()},
        topology.mixing(0),
        topology.edges(0),
    )
    for name in NAMES:
        torch.testing.assert_close(factors[name], expected[name], rtol=0, atol=1e-12)


def test_both_sides_of_a_difference_are_what_travelled() -> None:
    """On a bfloat16 wire the mean survives to float rounding: i adds w (x_j - x_i), j the same with
    the other sign.
    """
    topology = build_topology(TopologySection(kind="ring"), None, [str(i) for i in range(6)])
    factors = some_factors(6)
    before = average(factors)
    gossip = Gossip(
        factors,
        topology,
        build_rule(PeersSection()),
        MemoryTransport(torch.bfloat16),
        torch.bfloat16,
    )
    for round in range(5):
        gossip.round(round, train_nothing)
    for name, tensor in average(factors).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-14)
    exact = some_factors(6)
    Gossip(exact, topology, build_rule(PeersSection()), MemoryTransport(), torch.float64).round(
        0, train_nothing
    )
    rounded = some_factors(6)
    Gossip(rounded, topology, build_rule(PeersSection()), MemoryTransport(), torch.bfloat16).round(
        0, train_nothing
    )
    # the wire's rounding is real
    assert not torch.equal(exact["layer.lora_A"], rounded["layer.lora_A"])


@pytest.mark.parametrize(
    ("rule", "round", "trained", "sent"),
    [
        ("factor", 0, set(NAMES), set(NAMES)),
        ("ffa", 0, {"layer.lora_B", "classifier.weight"}, {"layer.lora_B", "classifier.weight"}),
        ("alternate", 1, {"layer.lora_B", "classifier.weight"}, set(NAMES)),
        ("alternate", 2, {"layer.lora_A", "classifier.weight"}, set(NAMES)),
        ("alternate", 4, {"layer.lora_B", "classifier.weight"}, set(NAMES)),
    ],
)
def test_rules_train_and_send_what_their_papers_say(
    rule: str, round: int, trained: set[str], sent: set[str]
) -> None:
    built = build_rule(PeersSection(rule=rule, period=2))
    assert {name for name in NAMES if built.trains(name, round)} == trained
    assert {name for name in NAMES if built.sends(name, round)} == sent


def test_bytes_on_wire_are_two_messages_an_edge() -> None:
    topology = build_topology(TopologySection(kind="ring"), None, [str(i) for i in range(5)])
    wire = MemoryTransport()
    factors = {name: tensor.float() for name, tensor in some_factors(5).items()}
    Gossip(factors, topology, build_rule(PeersSection()), wire).round(0, train_nothing)
    payload_bytes = 3 * 12 * 4
    header_bytes = wire.bytes_on_wire // 10 - payload_bytes
    assert wire.bytes_on_wire == 10 * (payload_bytes + header_bytes)
    assert 0 < header_bytes < 512
    half = MemoryTransport(torch.bfloat16)
    Gossip(factors, topology, build_rule(PeersSection()), half, torch.bfloat16).round(
        0, train_nothing
    )
    assert half.bytes_on_wire < wire.bytes_on_wire - 10 * payload_bytes // 2 + 200


def test_consensus_distance_is_the_mean_squared_distance_to_the_mean() -> None:
    factors = {"a": torch.tensor([[0.0, 0.0], [2.0, 4.0]]), "b": torch.tensor([[1.0], [1.0]])}
    assert consensus_distance(factors) == pytest.approx(1.0 + 4.0)
    assert consensus_distance({name: tensor[:1] for name, tensor in factors.items()}) == 0


def test_disagreement_falls_as_the_spectral_gap_promises() -> None:
    """On real factors, through gossip: after t rounds at most (1 - gap)^2t of the squared distance
    is left.
    """
    topology = build_topology(TopologySection(kind="ring"), None, [str(i) for i in range(8)])
    second = np.sort(
        np.abs(np.linalg.eigvalsh(nx.to_numpy_array(nx.cycle_graph(8)) / 3 + np.eye(8) / 3))
    )[-2]
    factors = some_factors(8)
    start = consensus_distance(factors)
    gossip = Gossip(factors, topology, build_rule(PeersSection()), MemoryTransport(), torch.float64)
    for round in range(30):
        gossip.round(round, train_nothing)
        assert consensus_distance(factors) <= start * second ** (2 * (round + 1)) * (1 + 1e-9)
    assert consensus_distance(factors) > start * second**60 * 1e-3  # the bound is not idle
