"""What "average" means for LoRA: the rules, one per published method.

Every rule mixes A and B apart (never their product) and in difference form,

    x_i += sum_j w_ij (sent_j - sent_i)        over the neighbours j whose exchange with i was
    committed,

so a neighbour that is missing adds nothing, and since w is symmetric the mean over all peers is
kept.

A schedule may leave peers with different units active. Then each edge mixes what both its ends
sent, tensor by tensor. That is as if the edge were missing for the other tensors: the mean of each
over all peers, whether they have it active or not, is kept exactly, since every matrix here is
symmetric (`Topology` refuses others). What changes is who moves: those who have a tensor active
agree among themselves, edge by edge; one who has it killed keeps what it has, and its share of the
mean, until this peer and one of its neighbours both have the tensor active. So a round agrees more
slowly, and not at all about a unit that no two neighbours ever have active at once.
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
        """Everything trains."""
        return True

    def sends(self, name: str, round: int) -> bool:
        """Everything is sent."""
        return True


class Ffa:
    """FFA-LoRA (arXiv 2403.12313): A stays as it started, alike for all, so averaging B is exact
    and half the bytes.
    """

    def trains(self, name: str, round: int) -> bool:
        """All but A."""
        return not name.endswith(".lora_A")

    def sends(self, name: str, round: int) -> bool:
        """All but A."""
        return self.trains(name, round)


@dataclass(frozen=True)
class Alternate:
    """ADF-LoRA (arXiv 2511.18291): B trains for ``period`` rounds, then A, and so on; both are
    mixed in every round.

    B goes first: while B is zero, A's gradient is zero.
    """

    period: int

    def trains(self, name: str, round: int) -> bool:
        """The factor whose turn it is, and the head always."""
        resting = ".lora_A" if (round // self.period) % 2 == 0 else ".lora_B"
        return not name.endswith(resting)

    def sends(self, name: str, round: int) -> bool:
        """Both factors: a resting factor that were not mixed would stay different from peer to
        peer.
        """
        return True


def build_rule(section: PeersSection) -> Rule:
    """The rule the config names."""
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
    receiver. ``names``: of each peer, the tensors that it sent; None: all. An edge mixes a tensor
    that both its ends sent, so for each tensor the matrix is still symmetric with rows that sum to
    one.
    """
    edges = list(committed)
    for name, message in sent.items():
        both_sent = [
            (i, j) for i, j in edges if names is None or (name in names[i] and name in names[j])
        ]
        # Rows sum to zero, so peer 0's value may be taken from all: between alike peers that is
        # exact, and what is multiplied is small, so rounding is small against the change and not
        # against the value.
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
) -> None:
    """One peer's ``factors`` ((1, ...) each) after one committed edge, in place: what it sent, what
    it received.

    A tensor that only one end sent is not mixed.
    """
    for name in sent.keys() & received.keys():
        factors[name] += weight * (received[name] - sent[name]).to(factors[name].device)
