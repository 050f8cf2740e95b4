"""Applies a schedule to the factors: which units take a local step, which are killed, how each
active unit is scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlora.config.bottleneck import BottleneckSection
from dlora.config.run import ScheduleSection
from dlora.config.training import LoraSection
from dlora.errors import ConfigError
from dlora.lora.factors import Factors, adds, of_module
from dlora.lora.kill_revive import Schedule
from dlora.lora.units import Unit, device_flops
from dlora.seeds import derive_seed


@dataclass(frozen=True)
class Scheduled:
    """The units of a model and one schedule for each participant.

    ``modules[u]``: the dotted names of the modules of unit u. ``on_change(participant, schedule)``
    is called after each change of an active set. ``nothing``: as in `StackedModel`.
    """

    section: ScheduleSection
    modules: tuple[tuple[str, ...], ...]
    schedules: tuple[Schedule, ...]
    on_change: Callable[[int, Schedule], None]
    nothing: Mapping[str, Tensor]

    def leaves_out(self, name: str) -> bool:
        """Whether the model has other values for the tensor ``name`` while its unit is dropped."""
        return self.section.on_kill == "drop" and (adds(name) or name in self.nothing)

    def dropped(self, name: str) -> Tensor | float:
        """What the model has for the tensor ``name`` of a dropped unit, so that its modules are
        those of the frozen model. PiSSA's weights are not: they need what was taken out of them.
        """
        return self.nothing.get(name, 0.0)

    def killed(self, participants: Iterable[int]) -> frozenset[int]:
        """The units that none of these ``participants`` trains now."""
        return frozenset(range(len(self.modules))).difference(
            *(self.schedules[number].active for number in participants)
        )


def schedule_units(
    section: ScheduleSection,
    units: Sequence[Unit],
    adapter: LoraSection | BottleneckSection,
    seed: int,
    participants: Sequence[str],
    on_change: Callable[[int, Schedule], None] = lambda participant, schedule: None,
    nothing: Mapping[str, Tensor] | None = None,
) -> Scheduled:
    """Make one schedule for each participant. ``nothing``: as in `StackedModel`.

    All participants draw from the same seed (the sets of ``random``, the order of kr's first
    rotation). Neighbours then have the same units active and can mix them. Scores, and the choices
    made by score, differ between participants. Raises ConfigError when ``schedule.units`` names a
    unit that the model does not have.
    """
    modules = tuple(unit.modules for unit in units)
    named = named_units(section.units or (), units)
    costs = [unit.cost for unit in units]
    flops = partial(device_flops, units, placement=adapter.placement)
    schedules = tuple(
        Schedule(section, costs, flops, derive_seed(seed, "schedule"), named) for _ in participants
    )
    return Scheduled(section, modules, schedules, on_change, nothing or {})


class ActiveUnits:
    """The schedules of the participants that are trained together, and their local steps.

    ``parameters``: the stacked tensors, (P, ...) each. The model is bound to them, and the backward
    pass writes their gradients. Each participant's part of a tensor has its own moments and its own
    step count, so a killed part does not change while the other parts train. P stacked
    participants therefore give the same result as P separate runs, whichever units are active. A
    tensor that is killed for all participants has no gradient.

    ``on_kill: hand_off``: the factors of a killed unit keep their values and stay in the model.
    ``on_kill: drop``: while local steps are taken (from `leave_out` to `put_back`), the unit's B
    (or core, or up) is kept in ``resting``, and ``parameters`` holds `Scheduled.dropped` in its
    place; so it is with all that `Scheduled.leaves_out` names. At all other times ``parameters``
    holds the values that are mixed and saved. To evaluate or export, put `Scheduled.dropped` into
    the tensors that `left_out` names first. ``kept``: zeros that become ``resting``; None: it makes
    them. When a unit is revived, its first moment starts at zero, its second moment is kept, and
    its learning rate rises to the common one within ``rewarm_steps``.
    """

    def __init__(
        self,
        parameters: Factors,
        participants: range,
        scheduled: Scheduled,
        kept: Factors | None = None,
    ) -> None:
        self.parameters, self.section = parameters, scheduled.section
        self.scheduled, self.participants = scheduled, participants
        self.schedules = [scheduled.schedules[participant] for participant in participants]
        self.on_change = [partial(scheduled.on_change, participant) for participant in participants]
        self.names = [
            [name for module in held for name in of_module(module) if name in parameters]
            for held in scheduled.modules
        ]
        self.unit_of = {name: unit for unit, names in enumerate(self.names) for name in names}
        self.allowed = frozenset(parameters)
        self.leaves = {
            f"{name}@{participant}": tensor[participant : participant + 1].detach()
            for name, tensor in parameters.items()
            for participant in range(len(participants))
        }
        self.resting = {
            name: torch.zeros_like(parameters[name]) if kept is None else kept[name]
            for name in self.unit_of
            if scheduled.leaves_out(name)
        }
        self._took_part = [set[int]() for _ in self.schedules]

    @torch.no_grad()
    def rest(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Count local steps that these participants leave out. Their turns go on, so their units
        stay those of the others.
        """
        for participant, schedule in enumerate(self.schedules):
            begun = schedule.active
            for _ in range(steps):
                before = schedule.active
                schedule.skip(1)
                for unit in schedule.active - before:
                    self._revive(optimizer, participant, unit)
            if schedule.active != begun:
                self.on_change[participant](schedule)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser.

        Each unit of each participant is a group, because the learning rates differ. The tensors
        that are in no unit form one more group for each participant.
        """
        outside = [name for name in self.parameters if name not in self.unit_of]
        return [
            {
                "params": [self.leaves[f"{name}@{participant}"] for name in names],
                "unit": unit,
                "participant": participant,
            }
            for participant in range(len(self.schedules))
            for unit, names in [*enumerate(self.names), (None, outside)]
            if names
        ]

    def leave_out(self) -> None:
        """Take dropped units out of the model. Call it before the local steps of a round."""
        for participant in range(len(self.schedules)):
            self._took_part[participant] = set()
            self._set_aside(participant, self._killed(participant))

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the kept values of dropped units back. Call it after the local steps of a round."""
        for name, participant in self.left_out():
            self.parameters[name][participant] = self.resting[name][participant]

    def left_out(self) -> Iterator[tuple[str, int]]:
        """Yield (tensor name, participant) for each tensor that is dropped now.

        The model that is evaluated or exported has `Scheduled.dropped` there.
        """
        for participant in range(len(self.schedules)):
            for unit in self._killed(participant):
                yield from (
                    (name, participant) for name in self.names[unit] if name in self.resting
                )

    def took_part(self, participant: int) -> frozenset[str]:
        """Names of the tensors that the participant's steps since `leave_out` may have changed.

        They are the tensors of every unit that was active in at least one of these local steps, and
        all tensors that are in no unit.
        """
        return frozenset(
            name
            for name in self.parameters
            if self.unit_of.get(name) in (None, *self._took_part[participant])
        )

    @property
    def killed(self) -> frozenset[int]:
        """The units that no participant of this group trains now."""
        return self.scheduled.killed(self.participants)

    def train_only(self, names: frozenset[str]) -> None:
        """Ask for gradients of those tensors in ``names`` that at least one participant trains."""
        self.allowed = names
        active = frozenset[int]().union(*(schedule.active for schedule in self.schedules))
        for name, tensor in self.parameters.items():
            tensor.requires_grad_(name in names and self.unit_of.get(name) in (None, *active))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set a participant's gradient to zero for each unit that it has killed.

        Another participant may train the unit, so the stacked tensor has a gradient for all. Call
        it before gradients are scored or clipped.
        """
        for name, tensor in self.parameters.items():
            if tensor.grad is not None and name in self.unit_of:
                for participant, schedule in enumerate(self.schedules):
                    if self.unit_of[name] not in schedule.active:
                        tensor.grad[participant] = 0.0

    @torch.no_grad()
    def scores(self) -> list[dict[int, float]]:
        """The score of each active unit: one dict {unit: score} for each participant.

        The score is the sum of |g| over the unit's B (or core, or up), where g is the gradient
        after the backward pass. A step of Adam moves every number by about the same amount, so to
        first order this sum is proportional to the fall of the loss. A (or down) is not counted:
        its gradient is zero while B is zero, so units that have trained little would get too low a
        score. Nor are DoRA's lengths, so that every round counts the same tensors. A round that
        trains only A gives no scores.
        """
        scored: list[dict[int, float]] = []
        for participant, schedule in enumerate(self.schedules):
            worth = {}
            for unit in sorted(schedule.active):
                gradients = [self.parameters[name].grad for name in self.names[unit] if adds(name)]
                if sums := [
                    gradient[participant].abs().sum()
                    for gradient in gradients
                    if gradient is not None
                ]:
                    worth[unit] = torch.stack(sums).sum()
            # one copy from the device for all units, since each copy waits for the device
            values = torch.stack([*worth.values()]).tolist() if worth else []
            scored.append(dict(zip(worth, values, strict=True)))
        return scored

    @torch.no_grad()
    def step(
        self,
        optimizer: torch.optim.Optimizer,
        learning_rate: float,
        scores: Sequence[Mapping[int, float]],
    ) -> None:
        """Take the optimiser's step for all active units, then let the schedules choose again.

        ``scores`` come from `scores`, one dict a participant. Each schedule sees its participant's
        scores and may change the active set.
        """
        for name, tensor in self.parameters.items():
            for participant, schedule in enumerate(self.schedules):
                takes_part = self.unit_of.get(name) in (None, *schedule.active)
                leaf = self.leaves[f"{name}@{participant}"]
                leaf.grad = (
                    tensor.grad[participant].unsqueeze(0)
                    if tensor.grad is not None and takes_part
                    else None
                )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * self._rewarming(group)
        optimizer.step()
        for leaf in (*self.leaves.values(), *self.parameters.values()):
            leaf.grad = None
        for participant, schedule in enumerate(self.schedules):
            active, epoch = schedule.active, schedule.epoch
            self._took_part[participant] |= active
            schedule.observe(scores[participant])
            if schedule.epoch != epoch:
                self._change(optimizer, participant, active, schedule.active)
                self.on_change[participant](schedule)
        self.train_only(self.allowed)

    def _rewarming(self, group: Mapping[str, Any]) -> float:
        if (
            group["unit"] is None
            or group["unit"] not in self.schedules[group["participant"]].active
        ):
            return 1.0
        age = self.schedules[group["participant"]].age(group["unit"])
        return 1.0 if age is None else min(1.0, (age + 1) / self.section.rewarm_steps)

    def _change(
        self,
        optimizer: torch.optim.Optimizer,
        participant: int,
        before: frozenset[int],
        after: frozenset[int],
    ) -> None:
        for unit in sorted(after - before):
            self._revive(optimizer, participant, unit)
            for name in self.names[unit]:
                if name in self.resting:
                    self.parameters[name][participant] = self.resting[name][participant]
        self._set_aside(participant, before - after)

    def _revive(self, optimizer: torch.optim.Optimizer, participant: int, unit: int) -> None:
        """The first moment of a revived unit starts at zero."""
        for name in self.names[unit]:
            state = optimizer.state.get(self.leaves[f"{name}@{participant}"], {})
            if "exp_avg" in state:
                state["exp_avg"].zero_()

    def _killed(self, participant: int) -> list[int]:
        return [
            unit
            for unit in range(len(self.names))
            if unit not in self.schedules[participant].active
        ]

    @torch.no_grad()
    def _set_aside(self, participant: int, killed: Iterable[int]) -> None:
        """Keep in ``resting`` what `Scheduled.leaves_out` names of these units, and take it out."""
        for unit in killed:
            for name in self.names[unit]:
                if name in self.resting:
                    self.resting[name][participant] = self.parameters[name][participant]
                    self.parameters[name][participant] = self.scheduled.dropped(name)


def named_units(wanted: Sequence[str], units: Sequence[Unit]) -> frozenset[int]:
    """The numbers of the units that hold a module whose name is, or ends with, a wanted name.

    Raises ConfigError when a wanted name matches no module.
    """
    found = set()
    for name in wanted:
        named = [
            number
            for number, unit in enumerate(units)
            if any(f".{module}".endswith(f".{name}") for module in unit.modules)
        ]
        if not named:
            there = dict.fromkeys(
                re.sub(r"\.\d+\.", ".*.", module) for unit in units for module in unit.modules
            )
            raise ConfigError(
                f"schedule.units: {name} is no adapted module; they are, * being a number:"
                f" {', '.join(there)}"
            )
        found.update(named)
    return frozenset(found)
