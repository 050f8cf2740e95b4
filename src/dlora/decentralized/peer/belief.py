"""How far a neighbour's message may lie from this peer's own factors before it is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlora.lora.factors import Factors

FAR = 100.0  # times this peer's own reach; see `Belief`
NEAR = 10.0  # times the larger of its reach and of what came over the same edge before
ROUNDING = 2.0**-8  # of a bfloat16 wire, relative


class Implausible(ValueError):
    """A message is so far from all that this peer has seen that it is not mixed; one line says how
    far.
    """


@dataclass
class Belief:
    """What one peer has seen of its own training and of each edge; all of it survives a resume.

    All peers start from the same factors and mixing only averages, so two honest peers are never
    further apart than the longer of their ways, each round's local steps laid end to end, plus the
    other's: |theirs - own| <= way_i + way_j. This peer knows its own way. A neighbour may have 99
    times as much (another learning rate, more rows in a local epoch): that is `FAR`. Once an edge
    has a history, a message is refused too when it is `NEAR` times further than this peer's way and
    than anything that came over the edge. What a liar sends moves neither the way nor, above `FAR`,
    the bound.

    ``step``: the way of one round's local steps of AdamW at the full learning rate, each number
    moving by that rate in each step: sqrt(numbers) x rate x steps; for peers that have not trained
    yet, or whose rate is still warming up.
    """

    initial: float  # norm of the factors that all started from
    step: float
    # sum over its rounds of how far this peer's own local steps moved its factors, as a norm
    way: float = 0.0
    rounds: int = 0  # of them
    # neighbour -> the largest distance of a message that was taken
    seen: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, initial: Mapping[str, Tensor], rate: float) -> Belief:
        """The belief of a peer that has seen nothing yet; ``rate``: the sum of a round's learning
        rates.
        """
        zero = {name: torch.zeros_like(tensor) for name, tensor in initial.items()}
        return cls(
            distance(zero, initial),
            rate * math.sqrt(sum(tensor.numel() for tensor in initial.values())),
        )

    def walked(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """A round's local steps led from one to the other ((1, ...) each)."""
        way = distance(before, after)
        if math.isfinite(way):
            self.way, self.rounds = self.way + way, self.rounds + 1

    def reach(self, round: int) -> float:
        """How far a peer that trains as this one does may have come after ``round``; rounds it
        skipped count as the others.
        """
        share = max(1.0, (round + 1) / max(1, self.rounds))
        return (self.way + self.step) * share + ROUNDING * self.initial

    def limit(self, neighbour: str, round: int) -> float:
        """The largest distance at which a message of ``neighbour`` is taken."""
        reach = self.reach(round)
        return min(FAR * reach, NEAR * max(reach, self.seen.get(neighbour, math.inf)))

    def judge(
        self, neighbour: str, round: int, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
    ) -> None:
        """Raise Implausible unless ``theirs`` is near enough to ``own``, over the tensors that both
        have.
        """
        apart, limit = distance(own, theirs), self.limit(neighbour, round)
        if not apart <= limit:
            raise Implausible(
                f"it is {apart:.1e} away from this peer's own, which has come {self.way:.1e} by"
                f" itself; at most {limit:.1e} is taken"
            )
        self.seen[neighbour] = max(apart, self.seen.get(neighbour, 0.0))

    def holds(self, round: int, sent: Mapping[str, Tensor], mixed: Mapping[str, Tensor]) -> bool:
        """Whether what a mix made of the factors is finite and within the bound, and so may be
        committed.
        """
        return all(tensor.isfinite().all() for tensor in mixed.values()) and distance(
            sent, mixed
        ) <= FAR * self.reach(round)

    def state(self) -> dict[str, Any]:
        """All that changes, for a checkpoint."""
        return asdict(self)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self.way, self.rounds, self.seen = state["way"], state["rounds"], dict(state["seen"])


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The norm of the difference over all tensors that both have; not finite where a number is
    not.
    """
    squares = 0.0
    for name in one.keys() & other.keys():
        difference = other[name].detach().cpu().double() - one[name].detach().cpu().double()
        squares += torch.linalg.vector_norm(difference).item() ** 2
    return math.sqrt(squares)


def copied(factors: Factors) -> Factors:
    """A copy that local steps leave alone."""
    return {name: tensor.detach().clone() for name, tensor in factors.items()}
