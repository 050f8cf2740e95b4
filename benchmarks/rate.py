"""The rate that Dec-LoRA proves, O(1 / sqrt T), measured where the optimum is known: the gradient
against T, K and the spectral gap, and the consensus error against the spectral gap.

    python benchmarks/rate.py [--output runs/rate.svg]

`rate_problems.py` has the problems, `rate_figure.py` the figure.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import rate_consensus
import torch
from rate_figure import Curve, Panel, Slope, Style, figure
from rate_problems import (
    Quadratics,
    Variant,
    exponent,
    graph,
    low_rank,
    random_quadratics,
    rounds_of,
    sent_names,
    shown,
)
from stacked_step import machine_facts, table
from torch import Tensor

from dlora.config.peers import PeersSection
from dlora.decentralized.mixing import Rule, build_rule
from dlora.decentralized.topology import Topology

PEERS, SEEDS, DIM = 16, 8, 10
ROUNDS = (100, 316, 1000, 3162, 10_000)
LOW_RANK_ROUNDS = ROUNDS[:4]
LOCAL_STEPS = (1, 4)
ALL_LOCAL_STEPS = (1, 2, 4, 8, 16)
K_ROUNDS, GAP_ROUNDS = 1000, 3162
KINDS = ("ring", "erdos-renyi", "exponential", "hypercube", "base-k", "complete")
RULES = ("factor", "ffa", "alternate")

SIGMA, START = 2.0, 0.5
QUADRATICS = {  # in this order; the figure shows the first three
    "noise alone": Variant(SIGMA, 0, 0),
    "spread alone": Variant(0, 8, 0),
    "all three": Variant(SIGMA, 8, START),
    "start alone": Variant(0, 0, START),
    "noise + start": Variant(SIGMA, 0, START),
}
SPREAD = 1  # the place of "spread alone"
NOISY = ("noise alone", "noise + start")  # where noise dominates
# the start of A in units of a usual random A
LOW_RANK = {"noise": Variant(SIGMA, 0, 1), "noise + spread": Variant(SIGMA, 4, 1)}
SINGULAR, SHAPE = (1.0, 0.7), (8, 8)
STYLES: tuple[Style, Style] = ("line", "dashed")
WITHIN = 0.05  # what the project promises: how near the exponent in T is to -1/2

THEORY = """
What the theory says, and what of it we know:

- Read, in the abstract of arXiv 2501.15361 v5: for smooth functions, bounded gradients and the
  usual mixing matrices, Dec-LoRA reaches a stationary point at O(1 / T^(1/2)).
- Not known to us: the constants, the step size, and how K and the spectral gap p enter. We infer
  that the rate is that of the squared gradient norm with respect to A and B, averaged over rounds.
- So for K and p we take the usual analysis of D-SGD (Koloskova et al. 2020, known to us from a
  summary): a noise term sigma / (n K T)^(1/2) without p, and a spread term K^2 zeta^2 / p^2 times
  the squared step size. Consensus error: squared step size x (K sigma^2 / p + K^2 zeta^2 / p^2).
- The step size is ours: (R / sigma) (n / (K T))^(1/2), with R = 0.5 and sigma = 2. It balances the
  start, R^2 / (step K T), and the noise, step sigma^2 / n. With it, theory says: noise T^(-1/2),
  K^(-1/2), p^0; spread T^(-1), K^(+1), p^(-2).
"""


def step_size(peers: int, local_steps: int, rounds: int) -> float:
    """The one that balances what the start and what the noise leave."""
    return START / SIGMA * math.sqrt(peers / (local_steps * rounds))


def gradient_of(
    problem: Quadratics, topology: Topology, rule: Rule, rounds: int, local_steps: int
) -> Tensor:
    """The mean over rounds of |grad f(mean x)|^2: (S, V)."""
    rate = step_size(topology.num_peers, local_steps, rounds)
    return rounds_of(
        problem,
        topology,
        rule,
        rounds,
        local_steps,
        rate,
        partial(problem.squared_gradient, names=["x"]),
    )[0]


def three_curves(kind: str, x: Sequence[float], values: Tensor) -> list[Curve]:
    """The first three quadratics on one topology; ``values``: (x, seeds, quadratics)."""
    return [
        Curve(
            f"{kind}, {name}",
            x,
            values[:, :, number].mean(dim=1).tolist(),
            number,
            STYLES[kind != KINDS[0]],
        )
        for number, name in enumerate(list(QUADRATICS)[:3])
    ]


def against_rounds() -> Panel:
    """Quadratics: the exponent in T, for every topology."""
    problem = random_quadratics(PEERS, SEEDS, DIM, list(QUADRATICS.values()))
    rule, rows, curves = build_rule(PeersSection()), [], list[Curve]()
    worst = 0.0
    for kind in KINDS:
        topology = graph(kind, PEERS)
        for local_steps in LOCAL_STEPS:
            values = torch.stack(
                [gradient_of(problem, topology, rule, rounds, local_steps) for rounds in ROUNDS]
            )
            slopes = [exponent(ROUNDS, values[:, :, v]) for v in range(len(QUADRATICS))]
            # the complete graph has no drift after one local step
            exact = values[-1].mean(dim=0) < 1e-20
            cells = [
                "0" if zero else shown(one)
                for one, zero in zip(slopes, exact.tolist(), strict=True)
            ]
            worst = max(
                worst,
                *(abs(slopes[list(QUADRATICS).index(name)][0] + 0.5) for name in NOISY),
            )
            late = exponent(ROUNDS[-2:], values[-2:, :, SPREAD])
            cells.append("0" if exact[SPREAD] else shown(late))
            rows.append([kind, f"{topology.spectral_gap:.3f}", local_steps, *cells])
            if local_steps == LOCAL_STEPS[0] and kind in (KINDS[0], "base-k"):
                curves += three_curves(kind, ROUNDS, values)
    print(
        f"\n**Quadratics: exponent in T** of the squared gradient norm, {PEERS} peers, {SEEDS}"
        f" seeds, T = {ROUNDS[0]} to {ROUNDS[-1]} (standard error over seeds)\n"
    )
    header = ["topology", "gap", "K", *QUADRATICS, "spread alone, last two T"]
    print(table(header, rows))
    print(
        f"\n{' and '.join(NOISY)}: farthest from -1/2 by {worst:.3f}, promised at most {WITHIN}:"
        f" {'kept' if worst <= WITHIN else 'MISSED'}."
    )
    return Panel(
        "Quadratics, K = 1", "rounds T", "mean squared gradient", curves, [Slope("T^-1/2", 0, -0.5)]
    )


def low_rank_against_rounds() -> Panel:
    """Low-rank recovery: the exponent in T, for every rule and topology."""
    problem = low_rank(PEERS, SEEDS, SHAPE, SINGULAR, list(LOW_RANK.values()))
    lost = min(SINGULAR) ** 2 / 2  # what f lacks at a saddle that misses one direction
    rows, curves = [], list[Curve]()
    for name in RULES:
        rule = build_rule(PeersSection(rule=name))
        names = sent_names(rule, problem.first())
        for kind, local_steps in [
            *((kind, LOCAL_STEPS[0]) for kind in KINDS),
            *((KINDS[0], steps) for steps in LOCAL_STEPS[1:]),
        ]:
            topology, values = graph(kind, PEERS), []
            for rounds in LOW_RANK_ROUNDS:
                mean, last = rounds_of(
                    problem,
                    topology,
                    rule,
                    rounds,
                    local_steps,
                    step_size(PEERS, local_steps, rounds),
                    partial(problem.squared_gradient, names=names),
                )
                values.append(mean)
            stacked, excess = torch.stack(values), problem.excess(last)
            slopes = [exponent(LOW_RANK_ROUNDS, stacked[:, :, v]) for v in range(len(LOW_RANK))]
            slopes += [
                exponent(LOW_RANK_ROUNDS[-2:], stacked[-2:, :, v]) for v in range(len(LOW_RANK))
            ]
            ends = [
                f"{median:.4f}, {stuck} of {SEEDS}"
                for median, stuck in zip(
                    excess.median(dim=0).values.tolist(),
                    (excess > lost / 2).sum(dim=0).tolist(),
                    strict=True,
                )
            ]
            rows.append([name, kind, local_steps, *map(shown, slopes), *ends])
            if (kind, local_steps) == (KINDS[0], LOCAL_STEPS[0]):
                for number, variant in enumerate(LOW_RANK):
                    y = stacked[:, :, number].mean(dim=1).tolist()
                    curves.append(
                        Curve(
                            f"{name}, {variant}",
                            LOW_RANK_ROUNDS,
                            y,
                            len(curves) // 2,
                            STYLES[number],
                        )
                    )
    print(
        f"\n**Low-rank recovery: exponent in T**, {SHAPE[0]} x {SHAPE[1]}, rank {len(SINGULAR)},"
        f" T = {LOW_RANK_ROUNDS[0]} to {LOW_RANK_ROUNDS[-1]}; and at the largest T: median of"
        f" f - best f, and how many seeds end above {lost / 2:.3f}, half of what a lost direction"
        " costs\n"
    )
    header = ["rule", "topology", "K", *LOW_RANK]
    header += [f"{what}{name}" for what in ("last two T, ", "end, ") for name in LOW_RANK]
    print(table(header, rows))
    print(
        "\nThe gradient of ffa is that of B alone. With its A, f cannot come nearer to the best f"
        f" than {problem.floor().median():.4f} (median)."
    )
    return Panel(
        f"Low rank, {KINDS[0]}, K = 1",
        "rounds T",
        "mean squared gradient",
        curves,
        [Slope("T^-1/2", 0, -0.5)],
    )


def against_local_steps() -> Panel:
    """Quadratics: the exponent in K."""
    problem = random_quadratics(PEERS, SEEDS, DIM, list(QUADRATICS.values()))
    rule, rows, curves = build_rule(PeersSection()), [], list[Curve]()
    for kind in (KINDS[0], "base-k"):
        values = torch.stack(
            [
                gradient_of(problem, graph(kind, PEERS), rule, K_ROUNDS, local_steps)
                for local_steps in ALL_LOCAL_STEPS
            ]
        )
        slopes = [exponent(ALL_LOCAL_STEPS, values[:, :, v]) for v in range(len(QUADRATICS))]
        rows.append([kind, *map(shown, slopes)])
        curves += three_curves(kind, ALL_LOCAL_STEPS, values)
    print(
        f"\n**Quadratics: exponent in K**, T = {K_ROUNDS}, K = {ALL_LOCAL_STEPS[0]} to"
        f" {ALL_LOCAL_STEPS[-1]}. Theory: noise -1/2, spread +1\n"
    )
    print(table(["topology", *QUADRATICS], rows))
    return Panel(
        f"Quadratics, T = {K_ROUNDS}",
        "local steps K",
        "mean squared gradient",
        curves,
        [Slope("K^-1/2", 0, -0.5), Slope("K^1", SPREAD, 1)],
    )


def against_gap() -> Panel:
    """Quadratics: the exponent in the spectral gap, the number of peers the same."""
    path = graph("edges", PEERS, edges=tuple((peer, peer + 1) for peer in range(PEERS - 1)))
    graphs = {
        "path": path,
        "ring, laplacian": graph("ring", PEERS, weights="laplacian"),
        "ring": graph("ring", PEERS),
        "erdos-renyi 0.25, laplacian": graph("erdos-renyi", PEERS, weights="laplacian", p=0.25),
        "erdos-renyi 0.25": graph("erdos-renyi", PEERS, p=0.25),
        "erdos-renyi 0.5": graph("erdos-renyi", PEERS, p=0.5),
        "exponential": graph("exponential", PEERS),
        "erdos-renyi 0.8": graph("erdos-renyi", PEERS, p=0.8),
    }
    problem = random_quadratics(PEERS, SEEDS, DIM, list(QUADRATICS.values()))
    rule = build_rule(PeersSection())
    gaps = [topology.spectral_gap for topology in graphs.values()]
    values = torch.stack(
        [gradient_of(problem, topology, rule, GAP_ROUNDS, 1) for topology in graphs.values()]
    )
    print(
        f"\n**Quadratics: exponent in the spectral gap**, {PEERS} peers, T = {GAP_ROUNDS}, K = 1."
        " Theory: noise 0, spread -2\n"
    )
    rows = [
        [name, f"{gap:.4f}", *(f"{cell:.3e}" for cell in one.mean(dim=0).tolist())]
        for name, gap, one in zip(graphs, gaps, values, strict=True)
    ]
    slopes = [exponent(gaps, values[:, :, v]) for v in range(len(QUADRATICS))]
    print(table(["graph", "gap", *QUADRATICS], [*rows, ["exponent", "", *map(shown, slopes)]]))
    curves = [
        Curve(name, gaps, values[:, :, v].mean(dim=1).tolist(), v, "dots")
        for v, name in enumerate(list(QUADRATICS)[:3])
    ]
    return Panel(
        f"Quadratics, T = {GAP_ROUNDS}, K = 1",
        "spectral gap p",
        "mean squared gradient",
        curves,
        [Slope("p^-2", SPREAD, -2)],
    )


def main() -> None:
    """Measure, print the tables and write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/rate.svg"), help="an SVG file")
    arguments = parser.parse_args()
    print(machine_facts())
    print(THEORY)
    panels = [against_rounds(), low_rank_against_rounds(), against_local_steps(), against_gap()]
    panels += rate_consensus.against_gap()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(figure(panels), encoding="utf-8")
    print(f"\nThe figure is in {arguments.output}.")


if __name__ == "__main__":
    main()
