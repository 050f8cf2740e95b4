"""Counts what a schedule's active units cost, as a fraction of the cost of all units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Meter:
    """Counts, over local steps, the adapter's numbers on the wire and the device's FLOPs per token.

    ``costs[u]``: numbers per token on the wire in one local step while unit u is active.
    ``flops(units)``: FLOPs per token that the device computes in one local step while these units
    are active.
    """

    def __init__(
        self, costs: Sequence[int], flops: Callable[[frozenset[int]], int], warmup_steps: int
    ) -> None:
        self.costs, self.flops, self.warmup_steps = tuple(costs), flops, warmup_steps
        self.steps = self.numbers = self.device_flops = 0
        self._in_warmup = (0, 0)  # numbers and FLOPs of the warm-up

    def count(self, active: frozenset[int]) -> None:
        """Count one local step in which the units ``active`` were active."""
        self.steps += 1
        self.numbers += sum(self.costs[unit] for unit in active)
        self.device_flops += self.flops(active)
        if self.steps == self.warmup_steps:
            self._in_warmup = self.numbers, self.device_flops

    @property
    def fraction(self) -> float:
        """The adapter's traffic so far, relative to all units active; 1 before the first step."""
        return self._fractions(0, 0, 0)[0] if self.steps else 1.0

    @property
    def flops_fraction(self) -> float:
        """The device's FLOPs so far, relative to all units active; 1 before the first step."""
        return self._fractions(0, 0, 0)[1] if self.steps else 1.0

    @property
    def after_warmup(self) -> tuple[float, float] | None:
        """(fraction, flops_fraction) of the steps after the warm-up; None before the first one."""
        if self.steps <= self.warmup_steps:
            return None
        return self._fractions(self.warmup_steps, *self._in_warmup)

    def state(self) -> dict[str, Any]:
        """The counts, in types that JSON can hold."""
        return {
            "numbers": self.numbers,
            "device_flops": self.device_flops,
            "in_warmup": list(self._in_warmup),
        }

    def load(self, state: Mapping[str, Any], steps: int) -> None:
        """Continue from what `state` returned after ``steps`` local steps."""
        self.steps = steps
        self.numbers, self.device_flops = state["numbers"], state["device_flops"]
        self._in_warmup = state["in_warmup"][0], state["in_warmup"][1]

    def _fractions(self, steps: int, numbers: int, flops: int) -> tuple[float, float]:
        """Both fractions without the first ``steps`` steps, which cost ``numbers``, ``flops``."""
        steps = self.steps - steps
        return (
            (self.numbers - numbers) / (steps * sum(self.costs)),
            (self.device_flops - flops) / (steps * self.flops(frozenset(range(len(self.costs))))),
        )
