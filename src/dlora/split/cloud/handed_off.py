"""The factors of killed units that devices handed to the cloud, kept for later parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from dlora.split.cloud.limits import Budget
from dlora.wire.frame import Misbehaviour
from dlora.wire.split.frames import ACTIVE, LEFT_OUT, Begin


@dataclass
class HandedOff:
    """The factors of one killed unit, one list for each module.

    Their memory counts as taken until a newer version has replaced them and no part uses them.
    """

    version: int
    factors: list[list[Tensor]]
    users: int = 0
    replaced: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all the tensors."""
        return sum(tensor.nbytes for own in self.factors for tensor in own)


class HandOffs:
    """What one device has handed off, by unit. Hold the session's lock for every call."""

    def __init__(self, device: str, budget: Budget) -> None:
        self.device, self.budget = device, budget
        self._kept: dict[int, HandedOff] = {}

    def keep(self, unit: int, new: HandedOff) -> None:
        """Store ``new`` instead of the unit's earlier version; parts that run already keep that
        version.

        If there is no memory for it, it is not stored, and parts that need it fail with "memory".
        """
        if (before := self._kept.pop(unit, None)) is not None:
            self._replaced(before)
        taken = self.budget.take(self.device, new.num_bytes)
        if taken:
            self._kept[unit] = new
        elif taken is None:
            self.budget.forgo(self.device, new.num_bytes)

    def named(self, begin: Begin, num_units: int) -> dict[int, HandedOff] | None:
        """The stored factors of each killed unit that ``begin`` names; None if one of them is not
        here.

        Raises Misbehaviour if ``begin`` lists another number of units than ``num_units``.
        """
        if begin.units and len(begin.units) != num_units:
            raise Misbehaviour(f"a begin lists {len(begin.units)} units, {num_units} were agreed")
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
        """Note that a part has ended which used these factors."""
        for kept in used:
            kept.users -= 1
            if kept.replaced and not kept.users:
                self.budget.give_back(self.device, kept.num_bytes)

    def clear(self) -> None:
        """Delete everything, because the link has ended."""
        for kept in self._kept.values():
            self._replaced(kept)
        self._kept.clear()

    def _replaced(self, kept: HandedOff) -> None:
        kept.replaced = True
        if not kept.users:
            self.budget.give_back(self.device, kept.num_bytes)
