"""Which topologies are refused, in one line, and how one is described."""

from typing import Any

import numpy as np
import pytest

from dlora.config.peers import TopologySection
from dlora.decentralized.matrices import check_mixing
from dlora.decentralized.topology import (
    Topology,
    build_topology,
    rounds_to_agree,
)
from dlora.errors import TopologyError
from dlora.show.topology import describe
from kit.topologies import build

# --- what is refused ---

NAMES = ("ana", "bo", "cy", "dee")


@pytest.mark.parametrize(
    ("keys", "names", "weights", "message"),
    [
        ({"kind": "ring"}, (), None, "ring was asked for 0 peers; it takes at least 1"),
        (
            {"kind": "hypercube"},
            NAMES[:3],
            None,
            "power of two, got 3 peers; take 2, 4, or kind base-k",
        ),
        ({"kind": "ring"}, NAMES, "laplace", "weights laplace: .* metropolis, laplacian"),
        (
            {"kind": "hypercube"},
            NAMES,
            "metropolis",
            "weights metropolis: topology hypercube fixes .* remove",
        ),
        (
            {"kind": "base-k"},
            NAMES,
            "laplacian",
            "weights laplacian: topology base-k fixes .* remove",
        ),
        (
            {"kind": "erdos-renyi", "p": 1e-9},
            NAMES,
            None,
            r"p 1e-09 and 4 peers: none of .* seed 0 .* above .* 0\.35",
        ),
        (
            {"kind": "edges", "edges": [("ana", "bob")]},
            NAMES,
            None,
            r"edges\[0\] is \[ana, bob\].* did you mean bo\?",
        ),
        (
            {"kind": "edges", "edges": [("ana", "zz")]},
            NAMES,
            None,
            "no peer is named zz; peers: ana, bo, cy, dee$",
        ),
        (
            {"kind": "edges", "edges": [(0, 4)]},
            NAMES,
            None,
            "no peer has index 4, there are 4 .* count from 0",
        ),
        ({"kind": "edges", "edges": [(-1, 0)]}, NAMES, None, "no peer has index -1"),
        (
            {"kind": "edges", "edges": [(17, 0)]},
            ("17", "23"),
            None,
            'index 17, .* write "17" in quotes',
        ),
        ({"kind": "edges", "edges": [("bo", 1)]}, NAMES, None, "a peer is not its own neighbour"),
        (
            {"kind": "edges", "edges": [(0, 1), ("bo", "ana")]},
            NAMES,
            None,
            r"edges\[1\] is .*edges\[0\] joins these two",
        ),
        (
            {"kind": "edges", "edges": [("ana", "cy"), ("dee", "bo")]},
            NAMES,
            None,
            r"edges is not connected: \{ana, cy\} \| \{bo, dee\}; join them by edges",
        ),
        (
            {"kind": "edges", "edges": []},
            tuple("abcdef"),
            None,
            r"\{a\} \| \{b\} \| \{c\} \| \.\.\. \(6 in all\)",
        ),
    ],
)
def test_what_cannot_be_mixed_on_is_refused_in_one_line(
    keys: Any, names: Any, weights: Any, message: str
) -> None:
    with pytest.raises(TopologyError, match=message) as refused:
        build_topology(TopologySection(**keys), weights, names)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        (np.ones((2, 3)), r"\(n, n\).* got shape \(2, 3\)"),
        (np.ones(2), r"got shape \(2,\)"),
        (np.ones((0, 0)), r"got shape \(0, 0\)"),
        ([[1, 0], [0, np.nan]], r"mixing\[1, 1\] = nan .* not a finite"),
        ([[np.inf, 0], [0, 1]], r"mixing\[0, 0\] = inf .* not a finite"),
        ([[1.5, -0.5], [-0.5, 1.5]], r"mixing\[0, 1\] = -0\.5 .* negative"),
        (
            [[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]],
            r"mixing\[0, 1\] = 0\.5 \(mixing\[1, 0\] = 0\) .* mirror",
        ),
        ([[0.5, 0.5], [0.5, 0.4]], r"row 1 .* sums to 0\.9"),
        ([[0.5, 0.5], [0.5, 0.5 + 1e-11]], "row 1 .* sums to 1.00000000001"),
    ],
)
def test_a_wrong_matrix_is_refused_by_its_row_or_entry(mixing: Any, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        check_mixing(mixing)
    with pytest.raises(TopologyError, match=message):
        Topology("by hand", ("ana", "bo"), (np.asarray(mixing, dtype=float),))


@pytest.mark.parametrize("matrices", [(np.eye(2),), (np.eye(2), np.eye(2))])
def test_peers_that_never_agree_are_refused_not_waited_for(matrices: Any) -> None:
    with pytest.raises(TopologyError, match="never agrees"):
        rounds_to_agree(Topology("by hand", ("ana", "bo"), matrices))


# --- in words ---


def test_description_of_a_static_topology() -> None:
    section = TopologySection(kind="edges", edges=(("ana", "bo"), ("bo", "cy")))
    assert describe(build_topology(section, None, ["ana", "bo", "cy"])).splitlines() == [
        "edges, 3 peers, the same in every round",
        "",
        "      neighbours (weight)",
        "ana   bo (0.333)",
        "bo    ana, cy (0.333)",
        "cy    bo (0.333)",
        "",
        "spectral gap                   0.333",
        "rounds to 100 times closer     12 (48 messages, 16 a peer)",
    ]


def test_description_of_a_cycle_has_a_column_a_round() -> None:
    assert describe(build("base-k", 3)).splitlines() == [
        "base-k, 3 peers, a cycle of 3 rounds",
        "",
        "         round 0        round 1          round 2",
        "peer-0   peer-1 (0.5)   peer-2 (0.667)   peer-1 (0.5)",
        "peer-1   peer-0 (0.5)   -                peer-0 (0.5)",
        "peer-2   -              peer-0 (0.667)   -",
        "",
        "spectral gap                   1",
        "rounds to 100 times closer     3 (6 messages, 2 a peer)",
        "rounds to the exact average    3 (6 messages, 2 a peer)",
    ]


@pytest.mark.parametrize("kind", ["base-k", "complete", "exponential", "ring"])
def test_description_of_many_peers_is_short_and_narrow_and_shows_every_round(kind: str) -> None:
    topology = build(kind, 100)
    text = describe(topology)
    assert "... and 92 more peers" in text and "peer-7 " in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 40
    assert all(
        f"round {round}" in text for round in range(topology.period if topology.period > 1 else 0)
    )


def test_description_of_sixteen_peers_names_them_all() -> None:
    assert [line.split()[0] for line in describe(build("ring", 16)).splitlines()[3:19]] == [
        f"peer-{i}" for i in range(16)
    ]
