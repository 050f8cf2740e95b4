"""The problems of `rate.py`, whose optimum is known, and D-SGD on them in the project's own rounds.

All problems of a table are solved at once. A tensor is (P, S, V, ...): P peers, S seeds, and V
variants, each with its own noise, spread and start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlora.config.peers import TopologySection
from dlora.decentralized.gossip import Gossip
from dlora.decentralized.mixing import Rule
from dlora.decentralized.topology import Topology, Weights, build_topology
from dlora.lora.factors import Factors
from dlora.net.counting import MemoryTransport

DTYPE = torch.float64
Vector = NDArray[np.float64]


class Variant(NamedTuple):
    """``noise``: sigma, the root of E |noise of one gradient|^2. ``spread``: zeta, how far the
    peers' own optima lie apart. ``start``: distance of the first point to the optimum.
    """

    noise: float
    spread: float
    start: float


class Problem(Protocol):
    """Functions f_i of the peers; f is their mean."""

    noise: Tensor  # (V,)

    def first(self) -> Factors:
        """Where all peers start."""

    def gradients(self, factors: Factors) -> Factors:
        """The gradient of f_i at the point of each peer i, without noise."""

    def squared_gradient(self, factors: Factors, names: Sequence[str]) -> Tensor:
        """|grad f|^2 at the mean of all points, with respect to the tensors ``names``: (S, V)."""


@dataclass
class Quadratics:
    """f_i(x) = 1/2 (x - c_i)^T H_i (x - c_i)."""

    curvatures: Tensor  # (P, S, d, d), the H_i
    centres: Tensor  # (P, S, V, d), the c_i
    noise: Tensor
    start: Tensor  # (S, V, d), from the optimum

    def __post_init__(self) -> None:
        self._mean = self.curvatures.mean(dim=0)
        pulls = (self.centres @ self.curvatures).mean(dim=0)
        self.optimum = torch.linalg.solve(self._mean, pulls.mT).mT

    def first(self) -> Factors:
        """All peers at one point."""
        return {"x": (self.optimum + self.start).expand_as(self.centres).clone()}

    def gradients(self, factors: Factors) -> Factors:
        """H_i (x_i - c_i); H_i is symmetric."""
        return {"x": (factors["x"] - self.centres) @ self.curvatures}

    def squared_gradient(self, factors: Factors, names: Sequence[str]) -> Tensor:
        """|mean(H_i) (mean x - optimum)|^2."""
        gradient: Tensor = (factors["x"].mean(dim=0) - self.optimum) @ self._mean
        return gradient.square().sum(dim=-1)


def random_quadratics(
    peers: int, seeds: int, dim: int, variants: Sequence[Variant], least: float = 0.25
) -> Quadratics:
    """Each peer has its own H_i, in random directions, with eigenvalues from ``least`` to 1."""
    draw = torch.Generator().manual_seed(1)
    square = torch.randn(peers, seeds, dim, dim, generator=draw, dtype=DTYPE)
    axes = torch.linalg.qr(square).Q
    values = least + (1 - least) * torch.rand(peers, seeds, 1, dim, generator=draw, dtype=DTYPE)
    centres = torch.randn(peers, seeds, 1, dim, generator=draw, dtype=DTYPE) / dim**0.5
    away = torch.randn(seeds, 1, dim, generator=draw, dtype=DTYPE)
    noise, spread, start = torch.tensor(variants, dtype=DTYPE).T
    return Quadratics(
        (axes * values) @ axes.mT,
        centres * spread[:, None],
        noise,
        away / away.norm(dim=-1, keepdim=True) * start[:, None],
    )


def alike_quadratics(curvature: Tensor, centres: Tensor, noise: Tensor, seeds: int) -> Quadratics:
    """All peers have H = diag(``curvature``), so the consensus error is known exactly.

    ``centres``: (P, V, d).
    """
    peers, variants, dim = centres.shape
    return Quadratics(
        torch.diag(curvature).expand(peers, seeds, dim, dim),
        centres[:, None].expand(peers, seeds, variants, dim),
        noise,
        torch.zeros(seeds, variants, dim, dtype=DTYPE),
    )


@dataclass
class LowRank:
    """f_i(A, B) = 1/2 |B A - R_i|^2, where R_i = M_i - W_i is what the frozen matrix lacks.

    The mean of all R_i has rank r, so the best value is known: that of B A = mean R.
    """

    targets: Tensor  # (P, S, V, out, in), the R_i
    first_A: Tensor  # (S, V, r, in)
    noise: Tensor

    def __post_init__(self) -> None:
        self._mean = self.targets.mean(dim=0)

    def first(self) -> Factors:
        """As in the paper: A is random and the same for all, B is zero."""
        peers, out, rank = len(self.targets), self.targets.shape[-2], self.first_A.shape[-2]
        one_A = self.first_A.expand(peers, *self.first_A.shape)
        zeros = torch.zeros(*one_A.shape[:-2], out, rank, dtype=DTYPE)
        return {"m.lora_A": one_A.clone(), "m.lora_B": zeros}

    def gradients(self, factors: Factors) -> Factors:
        """With respect to A and to B."""
        return _of_product(factors["m.lora_A"], factors["m.lora_B"], self.targets)

    def squared_gradient(self, factors: Factors, names: Sequence[str]) -> Tensor:
        """At the mean A and the mean B."""
        a, b = (factors[name].mean(dim=0) for name in ("m.lora_A", "m.lora_B"))
        gradients = _of_product(a, b, self._mean)
        sizes = [gradients[name].square().sum(dim=(-1, -2)) for name in names]
        return torch.stack(sizes).sum(dim=0)

    def excess(self, factors: Factors) -> Tensor:
        """f at the mean A and the mean B, less the best f of all: (S, V)."""
        product = factors["m.lora_B"].mean(dim=0) @ factors["m.lora_A"].mean(dim=0)
        return (product - self._mean).square().sum(dim=(-1, -2)) / 2

    def floor(self) -> Tensor:
        """The least `excess` while A stays as it began: (S, V)."""
        onto = torch.linalg.pinv(self.first_A) @ self.first_A
        left: Tensor = self._mean - self._mean @ onto
        return left.square().sum(dim=(-1, -2)) / 2


def _of_product(a: Tensor, b: Tensor, target: Tensor) -> Factors:
    apart = b @ a - target
    return {"m.lora_A": b.mT @ apart, "m.lora_B": apart @ a.mT}


def low_rank(
    peers: int,
    seeds: int,
    shape: tuple[int, int],
    singular: Sequence[float],
    variants: Sequence[Variant],
) -> LowRank:
    """The mean target has the ``singular`` values, and rank as many as there are."""
    draw = torch.Generator().manual_seed(2)
    (out, wide), rank = shape, len(singular)
    left, right = (
        torch.linalg.qr(torch.randn(seeds, side, rank, generator=draw, dtype=DTYPE)).Q
        for side in shape
    )
    shared = (left * torch.tensor(singular, dtype=DTYPE)) @ right.mT
    own = torch.randn(peers, seeds, out, wide, generator=draw, dtype=DTYPE) / (out * wide) ** 0.5
    own -= own.mean(dim=0)
    noise, spread, start = torch.tensor(variants, dtype=DTYPE).T
    targets = shared[:, None] + own[:, :, None] * spread[:, None, None]
    first_A = torch.randn(seeds, 1, rank, wide, generator=draw, dtype=DTYPE) / wide**0.5
    return LowRank(targets, first_A * start[:, None, None], noise)


def sent_names(rule: Rule, factors: Factors) -> list[str]:
    """The tensors that the rule ever trains and mixes."""
    return [name for name in factors if rule.sends(name, 0)]


def rounds_of(
    problem: Problem,
    topology: Topology,
    rule: Rule,
    rounds: int,
    local_steps: int,
    rate: float,
    look: Callable[[Factors], Tensor],
    after: int = 0,
) -> tuple[Tensor, Factors]:
    """Plain SGD with ``local_steps`` a round, then the project's gossip; no momentum, no clipping.

    Returns the mean of ``look`` over the beginnings of all rounds from ``after`` on, and the last
    factors.
    """
    factors, draw = problem.first(), torch.Generator().manual_seed(3)
    gossip = Gossip(factors, topology, rule, MemoryTransport(DTYPE), wire=DTYPE)
    # the noise is that of all numbers of a gradient together
    numbers = sum(tensor[0, 0, 0].numel() for tensor in factors.values())
    deviation = {
        name: (problem.noise / numbers**0.5).view(-1, *[1] * (tensor.dim() - 3))
        for name, tensor in factors.items()
    }
    losses, noisy = torch.zeros(topology.num_peers), bool(problem.noise.any())

    def train(names: frozenset[str]) -> Tensor:
        for _ in range(local_steps):
            for name, gradient in problem.gradients(factors).items():
                if name in names:
                    if noisy:
                        drawn = torch.randn(gradient.shape, generator=draw, dtype=DTYPE)
                        gradient.addcmul_(drawn, deviation[name])
                    factors[name].sub_(gradient, alpha=rate)
        return losses

    total = torch.zeros_like(look(factors))
    for round in range(rounds):
        if round >= after:
            total += look(factors)
        gossip.round(round, train)
    return total / (rounds - after), factors


def graph(kind: str, peers: int, weights: Weights | None = None, **more: Any) -> Topology:
    """A topology of ``peers``. erdos-renyi has p = 0.3 unless said otherwise, and base-k has
    k = 3: with 1 it is the hypercube.
    """
    usual: dict[str, dict[str, Any]] = {"erdos-renyi": {"p": 0.3}, "base-k": {"k": 3}}
    more = usual.get(kind, {}) | more
    section = TopologySection(kind=kind, **more)
    return build_topology(section, weights, [f"peer-{number}" for number in range(peers)])


def exponent(x: Sequence[float], values: Tensor) -> tuple[float, float]:
    """The slope of log ``values`` (X, S), averaged over seeds, against log ``x``; and its standard
    error, from the slopes of the single seeds.
    """
    logs = np.log(np.asarray(x, dtype=np.float64))
    slope = float(np.polyfit(logs, values.mean(dim=1).log().numpy(), 1)[0])
    seeds = np.polyfit(logs, values.log().numpy(), 1)[0]
    return slope, float(np.std(seeds, ddof=1) / math.sqrt(len(seeds)))


def shown(slope: tuple[float, float]) -> str:
    """A slope and its standard error."""
    return f"{slope[0]:+.3f} ({slope[1]:.3f})"
