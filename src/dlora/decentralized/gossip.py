"""One participant's life in rounds: train, exchange, mix, commit. No sockets, no clock in it.

Written for all the participants that live in this process at once ((P, ...) tensors): n of them in a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    def exchange(self, round: int, sent: Mapping[str, Tensor], edges: Sequence[Edge]) -> Sequence[Edge]:
        """Send each participant's message ((P, ...) tensors) over its ``edges``; return those both ends committed."""


@dataclass
class Gossip:
    """Dec-LoRA, Algorithm 1, for every participant: K local steps on (A, B), then a mix of A and B apart.

    The mix is x_i <- sum_j w_ij x_j. A participant that fails between two commits loses the local steps since the last
    one, nothing else.
    """

    factors: Factors
    topology: Topology
    rule: Rule
    transport: Transport
    wire: torch.dtype = torch.float32

    def round(self, number: int, train: Callable[[frozenset[str]], Tensor]) -> Tensor:
        """One round. ``train`` takes the names that train and returns losses (P,), which are returned."""
        losses = train(frozenset(name for name in self.factors if self.rule.trains(name, number)))
        sent = {
            name: tensor.to(self.wire).to(tensor.dtype)  # both sides of a difference are what travelled
            for name, tensor in self.factors.items()
            if self.rule.sends(name, number)
        }
        committed = self.transport.exchange(number, sent, self.topology.edges(number))
        mix(self.factors, sent, self.topology.mixing(number), committed)
        return losses
