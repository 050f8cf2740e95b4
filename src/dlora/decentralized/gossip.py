"""One round for all participants of a simulation at once: train, send, mix.

The same for one peer among others that may be late, gone or broken is `peer/life.py`. While nothing
fails the two are the same to rounding (law 5).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlora.decentralized.mixing import Rule, mix
from dlora.decentralized.topology import Topology
from dlora.lora.factors import Factors

Edge = tuple[int, int]


class Transport(Protocol):
    """What moves a message along the edges of a round."""

    def exchange(
        self,
        round: int,
        sent: Mapping[str, Tensor],
        edges: Sequence[Edge],
        names: Sequence[Collection[str]] | None = None,
    ) -> Sequence[Edge]:
        """Send each participant's message ((P, ...) tensors) over its ``edges``; return those both
        ends committed.

        ``names``: of each participant, which of the tensors its message holds; None: all.
        """


@dataclass
class Gossip:
    """Dec-LoRA, Algorithm 1, for every participant: K local steps on (A, B), then a mix of A and B
    apart.

    The mix is x_i <- sum_j w_ij x_j. A participant that fails between two commits loses the local
    steps since the last one, nothing else. With a schedule, ``took_part`` says of each participant
    what the round's local steps may have changed; that alone is sent, and an edge mixes what both
    its ends sent (`mixing`: what this does to the mean).
    """

    factors: Factors
    topology: Topology
    rule: Rule
    transport: Transport
    wire: torch.dtype = torch.float32
    took_part: Callable[[], Sequence[Collection[str]]] | None = None

    def round(self, number: int, train: Callable[[frozenset[str]], Tensor]) -> Tensor:
        """One round. ``train`` takes the names that train and returns losses (P,), which are
        returned.
        """
        losses = train(trained(self.factors, self.rule, number))
        sent = {
            # both sides of a difference are what travelled
            name: tensor.to(self.wire).to(tensor.dtype)
            for name, tensor in self.factors.items()
            if self.rule.sends(name, number)
        }
        names = self.took_part() if self.took_part is not None else None
        committed = self.transport.exchange(number, sent, self.topology.edges(number), names)
        mix(self.factors, sent, self.topology.mixing(number), committed, names)
        return losses


def trained(factors: Factors, rule: Rule, round: int) -> frozenset[str]:
    """The tensors that take local steps in a round."""
    return frozenset(name for name in factors if rule.trains(name, round))
