"""One round for all participants of a simulation at once: train, send, mix.

`peer/life.py` has the same round for one peer whose neighbours may be late, gone or broken. While
nothing fails the two give the same factors up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dlora.decentralized.mixing import Received, Rule, mix
from dlora.decentralized.topology import Topology
from dlora.lora.factors import Factors

Edge = tuple[int, int]


class Transport(Protocol):
    """Moves messages along the edges of a round."""

    def exchange(
        self,
        round: int,
        sent: Mapping[str, Tensor],
        edges: Sequence[Edge],
        names: Sequence[Collection[str]] | None = None,
    ) -> tuple[Sequence[Edge], Received]:
        """Send each participant's message over its ``edges``; return the edges that both ends
        committed, and the messages that came from other processes.

        ``sent``: (P, ...) tensors, one row for each participant of this process, not yet in the
        dtype of the wire. ``names``: for each participant of the run, the tensors that its message
        holds; None: all.
        """


@dataclass
class Gossip:
    """Dec-LoRA (arXiv 2501.15361), Algorithm 1, for every participant: K local steps on (A, B),
    then A and B are mixed apart.

    The mix is x_i <- sum_j w_ij x_j. A participant that fails between two commits loses only the
    local steps since the last commit. ``took_part`` (with a schedule) returns for each participant
    of the run the tensors that the round's local steps may have changed. Only these are sent, and
    an edge mixes the tensors that both its ends sent; `mixing` says what this does to the mean.

    ``factors`` are those of the participants ``here``, which train in this process; None: all of
    the topology. ``overlap``: the exchange runs while the next round's local steps do, so what
    mixing changes is added after them, one round late. It is ``pending`` until then. The mean over
    participants is kept as without it, because the changes of a round sum to zero. ``drawn`` says
    who takes part in a round; None: all. The others neither train nor mix. ``zeros_like`` makes the
    tensors of what is pending.
    """

    factors: Factors
    topology: Topology
    rule: Rule
    transport: Transport
    wire: torch.dtype = torch.float32
    took_part: Callable[[], Sequence[Collection[str]]] | None = None
    overlap: bool = False
    pending: Factors = field(default_factory=dict)
    here: range | None = None
    drawn: Callable[[int], Sequence[int]] | None = None
    zeros_like: Callable[[Tensor], Tensor] = torch.zeros_like

    def round(self, number: int, train: Callable[[frozenset[str]], Tensor]) -> Tensor:
        """Run one round and return the losses (P,) of ``train``, which takes the names that
        train.
        """
        losses = train(trained(self.factors, self.rule, number))
        self.settle()
        sent = {
            name: tensor for name, tensor in self.factors.items() if self.rule.sends(name, number)
        }
        names = self.took_part() if self.took_part is not None else None
        edges, mixing = self.topology.edges(number), self.topology.mixing(number)
        if self.drawn is not None:
            edges, mixing = self.topology.among(self.drawn(number), number)
        committed, received = self.transport.exchange(number, sent, edges, names)
        if self.overlap:
            self.pending = {name: self.zeros_like(self.factors[name]) for name in sent}
        changed = self.pending if self.overlap else self.factors
        mix(changed, sent, mixing, committed, names, self.here, received, self.wire)
        return losses

    @torch.no_grad()
    def settle(self) -> None:
        """Add what is pending."""
        for name, change in self.pending.items():
            self.factors[name] += change
        self.pending = {}


def trained(factors: Factors, rule: Rule, round: int) -> frozenset[str]:
    """The tensors that take local steps in ``round``."""
    return frozenset(name for name in factors if rule.trains(name, round))
