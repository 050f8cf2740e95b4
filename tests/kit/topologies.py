"""Topologies for tests, by kind and number of peers."""

from __future__ import annotations

import math
from typing import Any

from dlora.config.peers import TopologySection
from dlora.decentralized.topology import Topology, build_topology


def build(kind: str, n: int, weights: Any = None, **keys: Any) -> Topology:
    """A topology among n peers; an erdos-renyi graph and a list of edges (a star) are supplied
    where not given.
    """
    if kind == "erdos-renyi":
        keys.setdefault("p", min(1.0, 2 * math.log(n + 1) / n))
    if kind == "edges":
        keys.setdefault("edges", [(0, i) for i in range(1, n)])
    return build_topology(
        TopologySection(kind=kind, **keys), weights, [f"peer-{i}" for i in range(n)]
    )
