"""The consensus error of `rate.py`: measured, beside its exact prediction and theory's bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from rate_figure import Curve, Panel, Slope
from rate_problems import (
    DTYPE,
    Quadratics,
    Vector,
    alike_quadratics,
    exponent,
    graph,
    rounds_of,
    shown,
)
from scipy.linalg import solve_discrete_lyapunov
from stacked_step import table
from torch import Tensor

from dlora.config.peers import PeersSection
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.topology import Topology
from dlora.lora.factors import Factors

PEERS, MANY = 16, 32
RINGS = (8, 12, 16, 24, 32, 48, 64)
LOCAL_STEPS = 4
ROUNDS, RATE, DIM, SEEDS = 4000, 1e-3, 8, 16
ZERO = 1e-25  # rounding, where the complete graph agrees exactly
SHARE = 0.2  # what the project promises: farthest from the prediction


def consensus_error(factors: Factors) -> Tensor:
    """(1/n) sum_i |x_i - mean|^2 over all tensors: (S, V)."""
    return torch.stack(
        [
            tensor.var(dim=0, correction=0).flatten(start_dim=2).sum(dim=-1)
            for tensor in factors.values()
        ]
    ).sum(dim=0)


def predicted_consensus(
    topology: Topology, rate: float, local_steps: int, problem: Quadratics
) -> list[float]:
    """The stationary consensus error of `alike_quadratics`, exactly, for each variant.

    Take one coordinate, of curvature h. A round is x <- W (a x + (1 - a) c + noise), where
    a = (1 - rate h)^K and the noise of K local steps has variance v = rate^2 s^2 (1 + b + ... +
    b^(K-1)) at each peer, b = (1 - rate h)^2. Without the mean W becomes W - J. If all rounds have
    one W with eigenvalues l, then each of them but that of the mean adds

        v l^2 / (1 - a^2 l^2)   and   ((1 - a) l / (1 - a l))^2 c_l^2,

    where c_l is the part of c along its eigenvector. For a cycle, the same fixed point is solved
    for the product of its matrices, and the error is the mean over its rounds.
    """
    steps = [mixing.toarray() - 1 / topology.num_peers for mixing in topology.matrices]
    curvature = torch.diagonal(problem.curvatures[0, 0]).tolist()
    errors = []
    for variant, noise in enumerate(problem.noise.tolist()):
        total = 0.0
        for place, h in enumerate(curvature):
            once = 1 - rate * h
            centre = problem.centres[:, 0, variant, place].numpy()
            variance = rate**2 * noise**2 / len(curvature)
            variance *= sum(once ** (2 * step) for step in range(local_steps))
            total += _fixed_point(steps, once**local_steps, centre, variance)
        errors.append(total)
    return errors


def _fixed_point(steps: Sequence[Vector], kept: float, centre: Vector, variance: float) -> float:
    n = len(centre)

    def through(spread: Vector, mean: Vector, step: Vector) -> tuple[Vector, Vector]:
        return (
            step @ (kept**2 * spread + variance * np.eye(n)) @ step.T,
            step @ (kept * mean + (1 - kept) * centre),
        )

    cycle, spread, mean = np.eye(n), np.zeros((n, n)), 0 * centre
    for step in steps:
        cycle = kept * step @ cycle
        spread, mean = through(spread, mean, step)
    if variance:
        spread = solve_discrete_lyapunov(cycle, spread)
    mean = np.linalg.solve(np.eye(n) - cycle, mean).astype(np.float64)
    total = 0.0
    for step in steps:
        spread, mean = through(spread, mean, step)
        total += float(np.trace(spread) + mean @ mean)
    return total / (n * len(steps))


def simple_consensus(topology: Topology, rate: float, local_steps: int, noise: float) -> float:
    """rate^2 K sigma^2 / n times the sum of l^2 / (1 - l^2) over all eigenvalues l of W but that
    of the mean: noise alone, and no curvature. 0 for a cycle of several matrices.
    """
    if topology.period > 1:
        return 0.0
    values = np.linalg.eigvalsh(topology.mixing(0).toarray())[:-1]
    total = float((values**2 / (1 - values**2)).sum())
    return rate**2 * local_steps * noise**2 * total / topology.num_peers


def slowest(topology: Topology) -> Tensor:
    """The values of the peers, of mean square 1, that a mean round changes least."""
    mean = sum(mixing.toarray() for mixing in topology.matrices) / topology.period
    values: Vector = np.linalg.eigh(mean)[1][:, -2] * topology.num_peers**0.5
    return torch.from_numpy(values)


def _consensus(topology: Topology, local_steps: int) -> tuple[Tensor, list[float], float]:
    """The error measured, (S, 3), and predicted, for noise alone, random centres, and centres along
    the slowest direction of the graph; and the simple formula for noise alone.
    """
    peers, dim = topology.num_peers, DIM
    draw = torch.Generator().manual_seed(5)
    random = torch.randn(peers, dim, generator=draw, dtype=DTYPE) / dim**0.5
    slow = slowest(topology)[:, None].expand(peers, dim) / dim**0.5
    centres = torch.stack([torch.zeros_like(random), random - random.mean(dim=0), slow], dim=1)
    problem = alike_quadratics(
        torch.linspace(0.25, 1, dim, dtype=DTYPE),
        centres,
        torch.tensor([1.0, 0, 0], dtype=DTYPE),
        SEEDS,
    )
    measured, _ = rounds_of(
        problem,
        topology,
        build_rule(PeersSection()),
        ROUNDS,
        local_steps,
        RATE,
        consensus_error,
        ROUNDS // 2,
    )
    predicted = predicted_consensus(topology, RATE, local_steps, problem)
    return measured, predicted, simple_consensus(topology, RATE, local_steps, 1.0)


def against_gap() -> list[Panel]:
    """The consensus error beside its exact prediction, and its exponent in the gap on rings."""
    laplacian = graph("ring", PEERS, weights="laplacian")
    cases = [(graph("ring", peers), 1) for peers in RINGS]
    cases += [
        (graph("erdos-renyi", MANY, p=0.2), 1),
        *((graph(kind, MANY), 1) for kind in ("exponential", "hypercube", "base-k", "complete")),
        (graph("base-k", MANY - 1), 1),
        (laplacian, 1),
        *((graph(kind, PEERS), LOCAL_STEPS) for kind in ("ring", "exponential")),
    ]
    names = ("noise", "random centres", "slowest centres")
    rows, found, worst = [], list[tuple[float, Tensor, list[float]]](), 0.0
    for topology, local_steps in cases:
        measured, predicted, simple = _consensus(topology, local_steps)
        mean = measured.mean(dim=0).tolist()
        found.append((topology.spectral_gap, measured, predicted))
        ratios = [
            1.0 if max(one, exactly) <= ZERO else one / max(exactly, ZERO)
            for one, exactly in zip(mean, predicted, strict=True)
        ]
        worst = max(worst, *(abs(ratio - 1) for ratio in ratios))
        rows.append(
            [
                f"{topology.kind} {topology.num_peers}" + ", laplacian" * (topology is laplacian),
                f"{topology.spectral_gap:.4f}",
                local_steps,
                *(
                    f"{one:.2e} ({ratio:.3f})" if max(one, exactly) > ZERO else "0 (0)"
                    for one, ratio, exactly in zip(mean, ratios, predicted, strict=True)
                ),
                f"{mean[0] / simple:.3f}" if simple > ZERO else "-",
            ]
        )
    print(
        f"\n**Consensus error**, rate {RATE:g}, sigma 1, zeta 1; measured (measured /"
        " predicted exactly). Last column: noise, measured /"
        " the sum over eigenvalues without curvature\n"
    )
    print(table(["topology", "gap", "K", *names, "simple"], rows))
    print(
        f"\nFarthest from the prediction by {100 * worst:.1f} %, promised at most"
        f" {100 * SHARE:.0f} %: {'kept' if worst <= SHARE else 'MISSED'}."
    )
    rings = found[: len(RINGS)]
    gaps = [gap for gap, _, _ in rings]
    rows, curves = [], list[Curve]()
    for number, (name, bound) in enumerate(zip(names, (-1, -2, -2), strict=True)):
        slope = exponent(gaps, torch.stack([measured[:, number] for _, measured, _ in rings]))
        exact = exponent(gaps, torch.tensor([[of[number]] * 2 for _, _, of in rings]))[0]
        rows.append([name, shown(slope), f"{exact:+.3f}", bound])
        y = [measured[:, number].mean().item() for _, measured, _ in rings]
        curves.append(Curve(name, gaps, y, number, "dots"))
        exactly = [of[number] for _, _, of in rings]
        curves.append(Curve("predicted" if number == 0 else "", gaps, exactly, number, "dashes"))
    print(f"\n**Rings of {RINGS[0]} to {RINGS[-1]} peers: exponent in the gap**\n")
    print(table(["", "measured", "exact prediction", "theory's bound"], rows))
    points = [
        Curve(
            name,
            [of[number] for _, _, of in found if of[number] > ZERO],
            [m[:, number].mean().item() for _, m, of in found if of[number] > ZERO],
            number,
            "dots",
        )
        for number, name in enumerate(names)
    ]
    return [
        Panel(
            "Rings",
            "spectral gap p",
            "consensus error",
            curves,
            [Slope("p^-1", 0, -1), Slope("p^-2", 4, -2)],
        ),
        Panel(
            "All topologies", "predicted error", "consensus error", points, [Slope("equal", 0, 1)]
        ),
    ]
