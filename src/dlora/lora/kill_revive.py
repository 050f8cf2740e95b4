"""Which modules train now, which are killed, when one is revived.

Kill and Revive is DLoRA's (arXiv 2404.05182; the printed version says Halt and Proceed). Its own
metric, periods and ratios could not be read; what is here was chosen by measurement
(docs/lab-log.md). No tensors, no clock, no global random numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dlora.config.run import ScheduleSection
from dlora.lora.meter import Meter
from dlora.seeds import derive_seed

TRIALS_A_PERIOD = 5  # would fit: a trial takes that part of one
# units before and behind with which one is compared; a block has four where all linears are adapted
NEAR = 2


class Schedule:
    """One participant's schedule over units: groups of modules that share one input, numbered from
    0.

    ``costs[u]``: numbers a token on the wire while unit u is active (`Unit.cost`). ``active``: who
    trains in the next local step; ``epoch`` grows with each change of it. The cost of the active
    units is at most ``active_fraction`` of the cost of all, or that of the dearest unit alone where
    that is more, so that each unit can have its turn; so at least one is active. ``kind``:

    - all: every unit, always.
    - static: the units ``named``, always; their cost is what it is.
    - random: a fresh draw every ``period`` steps. Who is drawn is chance, so no bound on a unit's
      rest is promised.
    - probe: all for ``warmup_steps``, then once and for all those with the best utility.
    - kr: rotation through all units, ``warmup_steps`` in all; then those with the best utility.
      Then every ``period`` steps the unit that has rested longest is revived on trial, for a fifth
      of the period, a step at least: the active ones of the lowest utility are killed until there
      is room for it, and what room is left goes to the best that fit. After the trial those with
      the best utility are active again, the one on trial among them or not. A killed unit is active
      again after `longest_rest` steps at most; until then it competes with the utility of its
      latest turn.

    ``meter`` counts what the active units cost; it chooses nobody. Scores are not negative.
    Utility: the mean score of the unit's steps in its latest turn, divided by its cost; units are
    compared by it relative to those next to them in the model, for the scale of gradients changes
    with depth. Same seed and same scores give the same sets; `state` and `load` resume exactly.

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
        # the step from which a unit is what it is now, active or killed
        self.changed_at = [0] * len(self.costs)
        self.utility: list[float | None] = [None] * len(self.costs)  # None: never scored
        # of active units: sum and number in their latest turn
        self._scores: dict[int, tuple[float, int]] = {}
        self._warmup = self._rotation() if section.kind == "kr" else []
        self.active = self._first(named)
        self.meter = Meter(self.costs, flops, self.warmup_steps)

    @property
    def warmup_steps(self) -> int:
        """Steps before the first choice by utility: for kr as many as make all turns of the
        rotation equally long.
        """
        if self.section.kind == "kr":
            return len(self._warmup) * self._turn
        return self.section.warmup_steps if self.section.kind == "probe" else 0

    @property
    def longest_rest(self) -> int:
        """kr: no unit rests for more steps than this; who is killed queues behind those that rest
        already.
        """
        return self.warmup_steps + self.section.period * len(self.costs)

    def observe(self, scores: Mapping[int, float]) -> None:
        """A local step is done; ``scores`` of the units that were active in it, finite, or none.
        Who is active may change.
        """
        for unit, score in scores.items():
            total, count = self._scores.get(unit, (0.0, 0))
            self._scores[unit] = (total + score, count + 1)
            self.utility[unit] = (total + score) / (count + 1) / self.costs[unit]
        self._pass()

    def skip(self, steps: int) -> None:
        """Local steps that the others took without this participant: the turns go on, so that draws
        stay common.

        No score is seen; the traffic counts as if it had taken them.
        """
        for _ in range(steps):
            self._pass()

    def _pass(self) -> None:
        self.meter.count(self.active)
        self.steps_done += 1
        self._become(self._next())

    def age(self, unit: int) -> int | None:
        """Steps since an active unit was revived; None where it has been active from the start."""
        return None if self.changed_at[unit] == 0 else self.steps_done - self.changed_at[unit]

    def state(self) -> dict[str, Any]:
        """All that changes, as JSON can hold it."""
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
        """Go on from what `state` gave."""
        self.steps_done, self.epoch = state["steps_done"], state["epoch"]
        self.meter.load(state, self.steps_done)
        self.active = frozenset(state["active"])
        self.changed_at, self.utility = list(state["changed_at"]), list(state["utility"])
        self._scores = {unit: (total, count) for unit, total, count in state["scores"]}

    # Who is next

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
        """Whether, ``since`` steps behind the warm-up, a trial of kr's begins or ends."""
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
        """The active units with one of the killed among them."""
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
        """The best first; one that was never scored comes before all."""
        worth = {unit: self._relative(unit) for unit in units}
        return sorted(worth, key=lambda unit: (-worth[unit], unit))

    def _relative(self, unit: int) -> float:
        """A unit's utility over the mean of its own and its neighbours'."""
        own = self.utility[unit]
        if own is None:
            return math.inf
        # at the ends of the model as many as elsewhere
        first = max(0, min(unit - NEAR, len(self.units) - 2 * NEAR - 1))
        near = [
            utility for utility in self.utility[first : first + 2 * NEAR + 1] if utility is not None
        ]
        return own * len(near) / (sum(near) or 1.0)

    def _filled(self, active: frozenset[int], candidates: Iterable[int]) -> frozenset[int]:
        """``active`` and, in their order, those candidates that the budget still holds."""
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
        """All units in as few turns as a first fit finds; in which turn a unit comes is drawn from
        the seed.
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
        """Steps of one turn of the rotation."""
        return -(-self.section.warmup_steps // len(self._warmup))
