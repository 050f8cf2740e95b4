"""Killed groups' factors in the cloud, kept for the parts to come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from dlora.split.cloud.limits import Budget
from dlora.wire.frame import Misbehaviour
from dlora.wire.split.frames import ACTIVE, LEFT_OUT, Begin


@dataclass
class HandedOff:
    """A killed group's factors, of each module. Their memory is taken until they are replaced and
    no part uses them.
    """

    version: int
    factors: list[list[Tensor]]
    users: int = 0
    replaced: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for own in self.factors for tensor in own)


class HandOffs:
    """What one device has handed off, by group. Every call needs the session's lock."""

    def __init__(self, device: str, budget: Budget) -> None:
        self.device, self.budget = device, budget
        self._kept: dict[int, HandedOff] = {}

    def keep(self, group: int, new: HandedOff) -> None:
        """Take the place of what this group had; parts under way keep what they began with.

        Where there is no room it is not kept, and the parts that name it fail for want of memory.
        """
        if (before := self._kept.pop(group, None)) is not None:
            self._replaced(before)
        if self.budget.take(self.device, new.num_bytes):
            self._kept[group] = new
        else:
            self.budget.forgo(self.device, new.num_bytes)

    def named(self, begin: Begin, num_groups: int) -> dict[int, HandedOff] | None:
        """What was handed off of the groups that a part says are; None where it is not here.

        Raises Misbehaviour for another number of groups.
        """
        if begin.units and len(begin.units) != num_groups:
            raise Misbehaviour(f"{len(begin.units)} units for {num_groups} groups")
        named = {
            number: version
            for number, version in enumerate(begin.units)
            if version not in (ACTIVE, LEFT_OUT)
        }
        held = {number: kept for number in named if (kept := self._kept.get(number)) is not None}
        if any(number not in held or held[number].version != named[number] for number in named):
            return None
        return held

    def unused(self, used: Iterable[HandedOff]) -> None:
        """A part that used these has ended."""
        for kept in used:
            kept.users -= 1
            if kept.replaced and not kept.users:
                self.budget.give_back(self.device, kept.num_bytes)

    def clear(self) -> None:
        """The link has ended."""
        for kept in self._kept.values():
            self._replaced(kept)
        self._kept.clear()

    def _replaced(self, kept: HandedOff) -> None:
        kept.replaced = True
        if not kept.users:
            self.budget.give_back(self.device, kept.num_bytes)
