"""Decides which units train now, which are killed, and when a killed unit is revived.

Kill and Revive comes from DLoRA (arXiv 2404.05182; the published version says Halt and Proceed).
We could not read that paper's metric, periods and ratios, so the rules here were chosen by
measurement (docs/lab-log.md). The code uses no tensors, no clock and no global random numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dlora.config.run import ScheduleSection
from dlora.lora.meter import Meter
from dlora.seeds import derive_seed

TRIALS_A_PERIOD = 5  # a trial takes 1 / TRIALS_A_PERIOD of a period
# A unit is compared with this many units before it and behind it. A block has four units when all
# its linears are adapted.
NEAR = 2


class Schedule:
    """One participant's schedule over its units, which are numbered from 0.

    ``costs[u]``: numbers per token on the wire while unit u is active (`Unit.cost`). ``active``:
    the units that train in the next local step. ``epoch`` grows by one with each change of
    ``active``. The cost of the active units is at most ``active_fraction`` of the cost of all
    units, or the cost of the most expensive unit if that is higher. Each unit can therefore be
    active, and at least one unit is. ``kind``:

    - all: every unit is active in every step.
    - static: the units ``named`` are active in every step; their cost is not limited.
    - random: units are drawn anew every ``period`` steps. A unit can rest for any time.
    - probe: all units are active for ``warmup_steps``; after them, the units with the best utility
      are active until the end.
    - kr: a rotation through all units takes about ``warmup_steps`` steps. After it, the units with
      the best utility are active. Every ``period`` steps a trial begins: the unit that has rested
      longest is revived for a fifth of the period, at least one step. To make room for it within
      the cost limit, the active units with the lowest utility are killed; if room is left, the
      best units that fit are active too. After the trial the units with the best utility are
      active again; the unit on trial may be one of them. A killed unit is active again after at
      most `longest_rest` steps. While it rests, it keeps the utility of its latest turn.

    ``meter`` counts what the active units cost; it has no influence on the choice. Scores are not
    negative. The utility of a unit is the mean score of its steps in its latest turn, divided by
    its cost. For a comparison it is divided by the mean utility of the units nearby in the model,
    because the scale of gradients changes with depth. The same seed and the same scores give the
    same active sets; `state` and `load` resume exactly.

    Its attributes are what every choice of a unit depends on.
    """

    def __init__(
        self,
        section: ScheduleSection,
        costs: Sequence[int],
        flops: Callable[[frozenset[int]], int],
        seed: int,
        named: frozenset[int] = frozenset(),
    ) -> None:
        self.section, self.costs, self.seed = section, tuple(costs), seed
        self.units = range(len(self.costs))
        self.budget = max(section.active_fraction * sum(self.costs), max(self.costs))
        self.steps_done = 0
        self.epoch = 0
        # the step at which each unit became active or was killed
        self.changed_at = [0] * len(self.costs)
        self.utility: list[float | None] = [None] * len(self.costs)  # None: never scored
        # for each active unit: sum and number of its scores in this turn
        self._scores: dict[int, tuple[float, int]] = {}
        self._warmup = self._rotation() if section.kind == "kr" else []
        self.active = self._first(named)
        self.meter = Meter(self.costs, flops, self.warmup_steps)

    @property
    def warmup_steps(self) -> int:
        """Steps before the first choice by utility.

        For kr the config's number is rounded up, so that all turns of the rotation are equally
        long.
        """
        if self.section.kind == "kr":
            return len(self._warmup) * self._turn
        return self.section.warmup_steps if self.section.kind == "probe" else 0

    @property
    def longest_rest(self) -> int:
        """kr: no unit rests for more steps than this.

        A killed unit is revived after all units that rested before it.
        """
        return self.warmup_steps + self.section.period * len(self.costs)

    def observe(self, scores: Mapping[int, float]) -> None:
        """Record one local step; the active set may change.

        ``scores``: finite scores of the units that were active in this step, or an empty mapping.
        """
        for unit, score in scores.items():
            total, count = self._scores.get(unit, (0.0, 0))
            self._scores[unit] = (total + score, count + 1)
            self.utility[unit] = (total + score) / (count + 1) / self.costs[unit]
        self._pass()

    def skip(self, steps: int) -> None:
        """Count local steps that the other participants took without this one.

        The turns go on, so that this participant's draws stay equal to those of the others. There
        are no scores, and the meter counts the steps as if they had been taken here.
        """
        for _ in range(steps):
            self._pass()

    def _pass(self) -> None:
        self.meter.count(self.active)
        self.steps_done += 1
        self._become(self._next())

    def age(self, unit: int) -> int | None:
        """Steps since an active unit was revived; None if it has been active from the start."""
        return None if self.changed_at[unit] == 0 else self.steps_done - self.changed_at[unit]

    def state(self) -> dict[str, Any]:
        """Everything that changes in a run, in types that JSON can hold."""
        return {
            "steps_done": self.steps_done,
            "epoch": self.epoch,
            **self.meter.state(),
            "active": sorted(self.active),
            "changed_at": list(self.changed_at),
            "utility": list(self.utility),
            "scores": [[unit, *self._scores[unit]] for unit in sorted(self._scores)],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.steps_done, self.epoch = state["steps_done"], state["epoch"]
        self.meter.load(state, self.steps_done)
        self.active = frozenset(state["active"])
        self.changed_at, self.utility = list(state["changed_at"]), list(state["utility"])
        self._scores = {unit: (total, count) for unit, total, count in state["scores"]}

    # The next active set

    def _first(self, named: frozenset[int]) -> frozenset[int]:
        match self.section.kind:
            case "static":
                return named
            case "random":
                return self._drawn()
            case "kr":
                return self._warmup[0]
        return frozenset(self.units)

    def _next(self) -> frozenset[int]:
        kind, step, since = self.section.kind, self.steps_done, self.steps_done - self.warmup_steps
        if kind == "random" and step % self.section.period == 0:
            return self._drawn()
        if kind in ("probe", "kr") and since == 0:
            return self._best()
        if kind == "kr" and since < 0:
            return self._warmup[step // self._turn]
        if self.may_choose(since):
            return self._on_trial() if since % self.section.period == 0 else self._best()
        return self.active

    def may_choose(self, since: int) -> bool:
        """Whether a trial of kr begins or ends ``since`` steps after the warm-up."""
        period = self.section.period
        return (
            self.section.kind == "kr"
            and since >= period
            and since % period in (0, max(1, period // TRIALS_A_PERIOD))
        )

    def _best(self) -> frozenset[int]:
        self._scores.clear()
        return self._filled(frozenset(), self._by_utility(self.units))

    def _on_trial(self) -> frozenset[int]:
        """The next active set when a trial begins: it holds one revived unit."""
        self._scores.clear()
        killed = [unit for unit in self.units if unit not in self.active]
        if not killed:
            return self.active
        revived = min(killed, key=lambda unit: (self.changed_at[unit], unit))
        kept = self._by_utility(self.active)[:-1]
        while sum(self.costs[unit] for unit in (*kept, revived)) > self.budget:
            kept.pop()
        return self._filled(frozenset([*kept, revived]), self._by_utility(self.units))

    def _become(self, active: frozenset[int]) -> None:
        if active == self.active:
            return
        for unit in active ^ self.active:
            self.changed_at[unit] = self.steps_done
        self.active = active
        self.epoch += 1

    def _by_utility(self, units: Iterable[int]) -> list[int]:
        """The units sorted by relative utility, best first; units never scored come before all."""
        worth = {unit: self._relative(unit) for unit in units}
        return sorted(worth, key=lambda unit: (-worth[unit], unit))

    def _relative(self, unit: int) -> float:
        """A unit's utility divided by the mean utility of itself and the `NEAR` units on each side.

        The result is infinite for a unit that was never scored.
        """
        own = self.utility[unit]
        if own is None:
            return math.inf
        # at the ends of the model the window is moved, so that it holds as many units as elsewhere
        first = max(0, min(unit - NEAR, len(self.units) - 2 * NEAR - 1))
        near = [
            utility for utility in self.utility[first : first + 2 * NEAR + 1] if utility is not None
        ]
        return own * len(near) / (sum(near) or 1.0)

    def _filled(self, active: frozenset[int], candidates: Iterable[int]) -> frozenset[int]:
        """``active`` and, in their order, all candidates whose cost still fits into the budget."""
        chosen, cost = set(active), sum(self.costs[unit] for unit in active)
        for unit in candidates:
            if unit not in chosen and cost + self.costs[unit] <= self.budget:
                chosen.add(unit)
                cost += self.costs[unit]
        return frozenset(chosen)

    def _drawn(self) -> frozenset[int]:
        shuffled = list(self.units)
        random.Random(derive_seed(self.seed, "draw", self.steps_done)).shuffle(shuffled)
        return self._filled(frozenset(), shuffled)

    def _rotation(self) -> list[frozenset[int]]:
        """Turns that together hold all units, as few as first-fit packing finds.

        The seed decides in which turn a unit comes.
        """
        shuffled = list(self.units)
        generator = random.Random(derive_seed(self.seed, "rotation"))
        generator.shuffle(shuffled)
        left, turns = sorted(shuffled, key=lambda unit: -self.costs[unit]), []
        while left:
            turns.append(self._filled(frozenset(), left))
            left = [unit for unit in left if unit not in turns[-1]]
        generator.shuffle(turns)
        return turns

    @property
    def _turn(self) -> int:
        """The number of steps in one turn of the rotation."""
        return -(-self.section.warmup_steps // len(self._warmup))
