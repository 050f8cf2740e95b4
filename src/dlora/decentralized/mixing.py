"""What "average" means for LoRA: the rules, one per published method.

Every rule mixes A and B apart (never their product) and in difference form,

    x_i += sum_j w_ij (sent_j - sent_i)

The sum is over the neighbours j whose exchange with i was committed. A missing neighbour adds
nothing. Because w is symmetric, the mean over all peers is kept.

Under a schedule, peers may have different units active. Each edge then mixes the tensors that both
its ends sent, as if the edge were missing for all other tensors. Every matrix here is symmetric
(`Topology` refuses others), so the mean of each tensor over all peers is still kept exactly. Peers
that have a tensor active agree about it among themselves, edge by edge. A peer that has it killed
keeps its value until it and one of its neighbours both have the tensor active. Agreement is
therefore slower, and there is none about a unit that no two neighbours ever have active together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dlora.config.run import PeersSection
from dlora.lora.factors import Factors


class Rule(Protocol):
    """Which factors train in a round and which are sent and mixed after it."""

    def trains(self, name: str, round: int) -> bool:
        """Whether the tensor ``name`` takes local steps in ``round``."""

    def sends(self, name: str, round: int) -> bool:
        """Whether the tensor ``name`` is exchanged and mixed at the end of ``round``."""


class Factor:
    """Dec-LoRA (arXiv 2501.15361): A and B train together and are averaged apart."""

    def trains(self, name: str, round: int) -> bool:
        """True for every tensor."""
        return True

    def sends(self, name: str, round: int) -> bool:
        """True for every tensor."""
        return True


class Ffa:
    """FFA-LoRA (arXiv 2403.12313): A is the same for all peers and never trains. Averaging B is
    then exact, and a message has about half the bytes.
    """

    def trains(self, name: str, round: int) -> bool:
        """True for every tensor but A."""
        return not name.endswith(".lora_A")

    def sends(self, name: str, round: int) -> bool:
        """True for every tensor but A."""
        return self.trains(name, round)


@dataclass(frozen=True)
class Alternate:
    """ADF-LoRA (arXiv 2511.18291): B trains for ``period`` rounds, then A for as many, and so on.

    Both are mixed in every round. B goes first: while B is zero, A's gradient is zero.
    """

    period: int

    def trains(self, name: str, round: int) -> bool:
        """True for the factor whose turn it is, and always for the head."""
        resting = ".lora_A" if (round // self.period) % 2 == 0 else ".lora_B"
        return not name.endswith(resting)

    def sends(self, name: str, round: int) -> bool:
        """True for both factors: without mixing, the factor that does not train would stay
        different from peer to peer.
        """
        return True


def build_rule(section: PeersSection) -> Rule:
    """The rule that the config names."""
    rules: dict[str, Rule] = {
        "factor": Factor(),
        "ffa": Ffa(),
        "alternate": Alternate(section.period),
    }
    return rules[section.rule]


@torch.no_grad()
def mix(
    factors: Factors,
    sent: Mapping[str, Tensor],
    mixing: np.ndarray,
    committed: Iterable[tuple[int, int]],
    names: Sequence[Collection[str]] | None = None,
) -> None:
    """x_i += sum_j w_ij (sent_j - sent_i), for all peers i at once and in place, over the
    ``committed`` edges (i < j).

    ``factors`` and ``sent`` are (P, ...) each; ``mixing`` is the round's (P, P) matrix, row =
    receiver. ``names``: for each peer, the tensors that it sent; None: all. An edge mixes a tensor
    that both its ends sent. For each tensor the matrix is then still symmetric with rows that sum
    to one.
    """
    edges = list(committed)
    for name, message in sent.items():
        both_sent = [
            (i, j) for i, j in edges if names is None or (name in names[i] and name in names[j])
        ]
        # Rows sum to zero, so subtracting peer 0's value from all changes nothing in exact
        # arithmetic. It keeps the multiplied numbers small: the rounding error is small relative to
        # the change and not only to the value, and it is zero if all peers are the same.
        change = _differences(mixing, both_sent).to(message) @ (message - message[0]).flatten(1)
        factors[name] += change.view(factors[name].shape)


def _differences(mixing: np.ndarray, edges: Sequence[tuple[int, int]]) -> Tensor:
    """(P, P): row i times x is sum_j w_ij (x_j - x_i) over ``edges``."""
    weights = np.zeros_like(mixing)
    for i, j in edges:
        weights[i, j], weights[j, i] = mixing[i, j], mixing[j, i]
    return torch.from_numpy(weights - np.diag(weights.sum(axis=1)))


@torch.no_grad()
def mix_edge(
    factors: Factors, weight: float, sent: Mapping[str, Tensor], received: Mapping[str, Tensor]
) -> dict[str, float]:
    """Mix one peer's ``factors``, (1, ...) each, over one committed edge, in place.

    ``weight``: the neighbour weight. A tensor that only one end sent is not mixed. Returns for each
    mixed tensor the norm of the difference between the two ends.
    """
    apart = {}
    for name in sent.keys() & received.keys():
        difference = received[name] - sent[name]
        apart[name] = difference.norm().item()
        factors[name].add_(difference.to(factors[name].device), alpha=weight)
    return apart
