"""How far a neighbour's message may be from this peer's own factors before it is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

FAR = 100.0  # multiple of this peer's own reach; see `Belief`
# multiple of the larger of its reach and the largest distance that came over the same edge before
NEAR = 10.0
ROUNDING = 2.0**-8  # relative rounding error of a bfloat16 wire


class Implausible(ValueError):
    """A message is too far from all that this peer has seen, and is not mixed; one line says how
    far.
    """


@dataclass
class Belief:
    """What one peer has seen of its own training and of each edge; all of it survives a resume.

    A peer's way is the sum over rounds of the norm by which its local steps moved its factors. All
    peers start from the same factors and mixing only averages, so two honest peers are never
    further apart than the sum of their ways: |theirs - own| <= way_i + way_j. This peer knows only
    its own way. A neighbour's way may be 99 times as long (another learning rate, more rows in a
    local epoch): the bound is `FAR` times this peer's reach. After the first accepted message over
    an edge, a message is also refused if it is `NEAR` times further away than this peer's reach and
    than every earlier message over that edge. What a liar sends does not change the way, nor the
    bound of `FAR`.

    ``step``: the way of one round of AdamW at the full learning rate, if each number moves by that
    rate in each step: sqrt(numbers) x rate x steps. It serves peers that have not trained yet, or
    whose rate is still warming up.
    """

    initial: float  # norm of the initial factors
    step: float
    # sum over rounds of the norm by which this peer's local steps moved its factors
    way: float = 0.0
    rounds: int = 0  # rounds that are in ``way``
    # neighbour -> the largest distance of an accepted message
    seen: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, initial: Mapping[str, Tensor], rate: float) -> Belief:
        """The belief of a peer that has seen nothing yet.

        ``rate``: the sum of the learning rates of one round's local steps.
        """
        zero = {name: torch.zeros_like(tensor) for name, tensor in initial.items()}
        return cls(
            distance(zero, initial),
            rate * math.sqrt(sum(tensor.numel() for tensor in initial.values())),
        )

    def walked(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
        """Add the way of one round's local steps, and return it; not finite if a number is not.

        The steps changed the factors, (1, ...) each, from ``before`` to ``after``.
        """
        way = distance(before, after)
        if math.isfinite(way):
            self.way, self.rounds = self.way + way, self.rounds + 1
        return way

    def reach(self, round: int) -> float:
        """The largest norm by which a peer that trains like this one may have moved after
        ``round``.

        Rounds that this peer skipped count like the others.
        """
        share = max(1.0, (round + 1) / max(1, self.rounds))
        return (self.way + self.step) * share + ROUNDING * self.initial

    def limit(self, neighbour: str, round: int) -> float:
        """The largest distance at which a message of ``neighbour`` is accepted."""
        reach = self.reach(round)
        return min(FAR * reach, NEAR * max(reach, self.seen.get(neighbour, math.inf)))

    def judge(
        self, neighbour: str, round: int, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
    ) -> None:
        """Raise Implausible if ``theirs`` is too far from ``own``, over the tensors that
        both have.
        """
        apart, limit = distance(own, theirs), self.limit(neighbour, round)
        if not apart <= limit:
            raise Implausible(
                f"it is {apart:.1e} away from this peer's own, which has come {self.way:.1e} by"
                f" itself; at most {limit:.1e} is taken"
            )
        self.seen[neighbour] = max(apart, self.seen.get(neighbour, 0.0))

    def holds(self, round: int, moved: float) -> bool:
        """Whether mixed factors may be committed; ``moved``: how far mixing moved them.

        A difference is finite only if both numbers are.
        """
        return moved <= FAR * self.reach(round)

    def state(self) -> dict[str, Any]:
        """All fields, for a checkpoint."""
        return asdict(self)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the fields that change from a checkpoint."""
        self.way, self.rounds, self.seen = state["way"], state["rounds"], dict(state["seen"])


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The norm of the difference over all tensors that both have; not finite if a number is not."""
    squares = 0.0
    for name in one.keys() & other.keys():
        difference = other[name].detach().cpu() - one[name].detach().cpu()
        norm = torch.linalg.vector_norm(difference).item()
        if not math.isfinite(norm):  # the squares may be too large for float32
            norm = torch.linalg.vector_norm(difference, dtype=torch.float64).item()
        squares += norm**2
    return math.sqrt(squares)
