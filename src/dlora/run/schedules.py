"""The schedules of one run: made from its config, reported in its log, kept in its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from dlora.events.kinds import Active, Saved, Units
from dlora.lora.active import Scheduled, schedule_units
from dlora.lora.kill_revive import Schedule
from dlora.lora.units import device_flops
from dlora.run.prepare import Prepared


class Schedules:
    """The schedule of each participant in the run ``run``.

    ``scheduled`` is None if all units are always active. ``emit`` is called
    for each change of an active set.
    """

    def __init__(self, run: str, prepared: Prepared, emit: Callable[[Active], object]) -> None:
        self.run, self.prepared, self.emit = run, prepared, emit
        self.scheduled = (
            None
            if prepared.config.schedule.kind == "all"
            else _made(prepared, prepared.names, self._changed)
        )

    @property
    def each(self) -> Sequence[Schedule]:
        """One schedule for each participant; empty without a schedule."""
        return self.scheduled.schedules if self.scheduled else ()

    def tell(self, tell: Callable[[Units | Active], object]) -> None:
        """Report the units and the first active sets: events "units" and "active" for ``tell``."""
        if self.scheduled is not None:
            placement = self.prepared.config.adapter_section.placement
            units = [{"modules": unit.modules, "cost": unit.cost} for unit in self.prepared.units]
            every = device_flops(self.prepared.units, range(len(units)), placement)
            tell(Units(event="units", run=self.run, units=units, device_flops=every))
            for participant, schedule in enumerate(self.each):
                tell(self._who_is_active(participant, schedule))

    def skip(self, rounds: int) -> None:
        """Skip rounds, because the peer catches up with the others."""
        for participant, (schedule, steps) in enumerate(
            zip(self.each, self.prepared.local_steps, strict=False)
        ):
            schedule.skip(rounds * steps)
            self._changed(participant, schedule)

    def share(self) -> None:
        """Bring the schedules of the participants that other ranks train up to date."""
        if self.prepared.ranks.are_several and self.each:
            own = [self.each[number].state() for number in self.prepared.here]
            for schedule, state in zip(self.each, self.prepared.ranks.joined(own), strict=True):
                schedule.load(state)

    def state(self) -> dict[str, Any]:
        """All that changes, for a checkpoint."""
        return {"schedules": [schedule.state() for schedule in self.each]} if self.each else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""
        for schedule, of_one in zip(self.each, state.get("schedules", ()), strict=True):
            schedule.load(of_one)

    @property
    def spent(self) -> Saved:
        """The adapter's traffic and a split device's FLOPs, as fractions of those with all units
        active.

        Each is the mean over the participants, for the whole run and for the part after the
        warm-up.
        """
        whole = [(one.meter.fraction, one.meter.flops_fraction) for one in self.each]
        after = [one.meter.after_warmup for one in self.each]
        means = {"": whole, "_after_warmup": [both for both in after if both is not None]}
        fractions = {
            f"{name}_fraction{part}": sum(both[place] for both in of_all) / len(of_all)
            for part, of_all in means.items()
            for place, name in enumerate(("adapter", "device_flops"))
            if of_all
        }
        return cast(Saved, fractions)

    def _changed(self, participant: int, schedule: Schedule) -> None:
        self.emit(self._who_is_active(participant, schedule))

    def _who_is_active(self, participant: int, schedule: Schedule) -> Active:
        """Event "active": the active set from local step ``step`` on, and its
        FLOPs a token.

        ``utility`` has the last known value of each unit. The fractions compare what was spent so
        far with what all units active would have cost.
        """
        return Active(
            event="active",
            run=self.run,
            peer=self.prepared.names[participant],
            step=schedule.steps_done,
            epoch=schedule.epoch,
            units=sorted(schedule.active),
            utility=list(schedule.utility),
            device_flops=schedule.meter.flops(schedule.active),
            adapter_fraction=schedule.meter.fraction,
            device_flops_fraction=schedule.meter.flops_fraction,
        )


def first_step(prepared: Prepared) -> dict[str, Any]:
    """How many units there are, how many are active in the first step, and their fraction of the
    adapter's traffic.
    """
    [schedule] = _made(prepared, ["any"]).schedules
    fraction = sum(schedule.costs[unit] for unit in schedule.active) / sum(schedule.costs)
    kind, units = schedule.section.kind, len(schedule.costs)
    return {
        "kind": kind,
        "units": units,
        "active": len(schedule.active),
        "adapter_fraction": fraction,
    }


def _made(
    prepared: Prepared,
    participants: Sequence[str],
    on_change: Callable[[int, Schedule], None] = lambda participant, schedule: None,
) -> Scheduled:
    """One schedule for each participant; warns if the run ends before the schedule chooses
    anything.
    """
    config = prepared.config
    made = schedule_units(
        config.schedule,
        prepared.units,
        config.adapter_section,
        config.seed,
        participants,
        on_change,
        prepared.model.nothing,
    )
    warmup_steps, steps = (
        made.schedules[0].warmup_steps,
        config.train.rounds * max(prepared.local_steps),
    )
    if warmup_steps >= steps:
        warnings.warn(
            f"schedule: {config.schedule.kind} chooses after a warm-up of {warmup_steps} local"
            f" steps, and this run has {steps}; lower schedule.warmup_steps, or train longer",
            stacklevel=2,
        )
    return made
