"""What a schedule does to factors: who takes a step, who rests, and what each unit's step was
worth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dlora.config.run import ScheduleSection
from dlora.config.training import LoraSection
from dlora.errors import ConfigError
from dlora.lora.factors import Factors
from dlora.lora.kill_revive import Schedule
from dlora.lora.units import Unit, device_flops
from dlora.seeds import derive_seed


@dataclass(frozen=True)
class Scheduled:
    """The units of a model and a schedule for each participant. ``modules[u]``: dotted names of the
    modules of unit u.

    ``on_change(participant, schedule)`` hears of every change of an active set.
    """

    section: ScheduleSection
    modules: tuple[tuple[str, ...], ...]
    schedules: tuple[Schedule, ...]
    on_change: Callable[[int, Schedule], None]

    def killed(self, participants: Iterable[int]) -> frozenset[int]:
        """Units that none of these trains now."""
        return frozenset(range(len(self.modules))).difference(
            *(self.schedules[number].active for number in participants)
        )


def schedule_units(
    section: ScheduleSection,
    groups: Sequence[Unit],
    lora: LoraSection,
    seed: int,
    participants: Sequence[str],
    on_change: Callable[[int, Schedule], None] = lambda participant, schedule: None,
) -> Scheduled:
    """One schedule a participant. Raises ConfigError for a unit that is not there.

    What is drawn (random, the order of kr's first rotation) is drawn alike for all, so that
    neighbours have the same units active and can mix them; scores, and what is chosen by them, are
    each participant's own.
    """
    modules = tuple(group.modules for group in groups)
    named = named_units(section.units or (), groups)
    costs = [group.cost for group in groups]
    flops = partial(device_flops, groups, r=lora.r, placement=lora.placement)
    schedules = tuple(
        Schedule(section, costs, flops, derive_seed(seed, "schedule"), named) for _ in participants
    )
    return Scheduled(section, modules, schedules, on_change)


class ActiveUnits:
    """The schedules of the participants of one group of training, and how they take a step.

    ``parameters``: the stacked tensors ((P, ...) each) that the model is bound to and gradients
    arrive at. Each participant's part of a tensor has moments and step count of its own, so a
    killed one rests whole while the others go on: P stacked participants are P separate runs
    whoever is active. A tensor that is killed for all participants has no gradient at all.

    Handed off: a killed unit's factors stay what they are and are applied. Dropped: from
    `leave_out` to `put_back`, while local steps are taken, its B (or core) is set aside in
    ``resting`` and zero stands in its place. Between, ``parameters`` are what is mixed and kept.
    What is evaluated and exported is ``parameters`` without what `left_out` names. A revived
    unit's first moment is zero, its second what it was, and its learning rate rises to the
    schedule's over ``rewarm_steps``.
    """

    def __init__(self, parameters: Factors, participants: range, scheduled: Scheduled) -> None:
        self.parameters, self.section = parameters, scheduled.section
        self.schedules = [scheduled.schedules[participant] for participant in participants]
        self.on_change = [partial(scheduled.on_change, participant) for participant in participants]
        self.names = [
            [
                name
                for module in held
                for factor in "ABM"
                if (name := f"{module}.lora_{factor}") in parameters
            ]
            for held in scheduled.modules
        ]
        self.unit_of = {name: unit for unit, names in enumerate(self.names) for name in names}
        self.allowed = frozenset(parameters)
        self.leaves = {
            f"{name}@{participant}": tensor[participant : participant + 1].detach()
            for name, tensor in parameters.items()
            for participant in range(len(participants))
        }
        dropped = self.section.on_kill == "drop"
        factors = [
            name for name in self.unit_of if dropped and name.endswith((".lora_B", ".lora_M"))
        ]
        self.resting = {name: torch.zeros_like(parameters[name]) for name in factors}
        self._took_part = [set[int]() for _ in self.schedules]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser: the leaves of each unit of each participant, whose
        learning rates differ, and those that are in no unit.
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
        """The local steps of a round begin: zero stands where a unit is dropped."""
        for participant in range(len(self.schedules)):
            self._took_part[participant] = set()
            self._set_aside(participant, self._killed(participant))

    @torch.no_grad()
    def put_back(self) -> None:
        """The local steps of a round have ended: what was set aside is in its place again."""
        for name, participant in self.left_out():
            self.parameters[name][participant] = self.resting[name][participant]

    def left_out(self) -> Iterator[tuple[str, int]]:
        """Tensor and participant of what is dropped now: it is zero in the function that is
        evaluated and exported.
        """
        for participant in range(len(self.schedules)):
            for unit in self._killed(participant):
                yield from (
                    (name, participant) for name in self.names[unit] if name in self.resting
                )

    def took_part(self, participant: int) -> frozenset[str]:
        """What a participant's local steps since `leave_out` may have changed: its units active in
        any, all that is in none.
        """
        return frozenset(
            name
            for name in self.parameters
            if self.unit_of.get(name) in (None, *self._took_part[participant])
        )

    @property
    def killed(self) -> frozenset[int]:
        """Units that nobody here trains."""
        return frozenset(range(len(self.names))).difference(
            *(schedule.active for schedule in self.schedules)
        )

    def train_only(self, names: frozenset[str]) -> None:
        """Gradients for those of ``names`` that are active for somebody."""
        self.allowed = names
        active = frozenset[int]().union(*(schedule.active for schedule in self.schedules))
        for name, tensor in self.parameters.items():
            tensor.requires_grad_(name in names and self.unit_of.get(name) in (None, *active))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero where a participant has killed what another one trains; before anybody's gradient is
        measured.
        """
        for name, tensor in self.parameters.items():
            if tensor.grad is not None and name in self.unit_of:
                for participant, schedule in enumerate(self.schedules):
                    if self.unit_of[name] not in schedule.active:
                        tensor.grad[participant] = 0.0

    @torch.no_grad()
    def scores(self) -> list[dict[int, float]]:
        """What each participant's active units are worth: the sum of |g| over a unit's B or core,
        as the backward pass left g.

        To first order that is what a step of Adam's, which moves every number alike, takes off the
        loss. A's gradient is zero while B is: counted too, it would make units that have trained
        little seem worth less. Rounds that train A alone give no scores.
        """
        scored: list[dict[int, float]] = []
        for participant, schedule in enumerate(self.schedules):
            worth = {}
            for unit in sorted(schedule.active):
                gradients = [
                    self.parameters[name].grad
                    for name in self.names[unit]
                    if not name.endswith(".lora_A")
                ]
                if sums := [
                    gradient[participant].abs().sum()
                    for gradient in gradients
                    if gradient is not None
                ]:
                    worth[unit] = torch.stack(sums).sum()
            # one wait for the device
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
        """The optimiser's step for all who are active; then the schedules see its `scores` and may
        change who is.
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
            for name in self.names[unit]:
                state = optimizer.state.get(self.leaves[f"{name}@{participant}"], {})
                if "exp_avg" in state:
                    state["exp_avg"].zero_()
                if name in self.resting:
                    self.parameters[name][participant] = self.resting[name][participant]
        self._set_aside(participant, before - after)

    def _killed(self, participant: int) -> list[int]:
        return [
            unit
            for unit in range(len(self.names))
            if unit not in self.schedules[participant].active
        ]

    @torch.no_grad()
    def _set_aside(self, participant: int, killed: Iterable[int]) -> None:
        """Dropped units: their B rests, zero stands in its place."""
        for unit in killed:
            for name in self.names[unit]:
                if name in self.resting:
                    self.resting[name][participant] = self.parameters[name][participant]
                    self.parameters[name][participant] = 0.0


def named_units(wanted: Sequence[str], groups: Sequence[Unit]) -> frozenset[int]:
    """The units that hold a module of that name, or whose name ends so. Raises ConfigError where
    there is none.
    """
    found = set()
    for name in wanted:
        units = [
            u
            for u, group in enumerate(groups)
            if any(f".{module}".endswith(f".{name}") for module in group.modules)
        ]
        if not units:
            there = dict.fromkeys(
                re.sub(r"\.\d+\.", ".*.", module) for group in groups for module in group.modules
            )
            raise ConfigError(
                f"schedule.units: {name} is no adapted module; they are, * being a number:"
                f" {', '.join(there)}"
            )
        found.update(units)
    return frozenset(found)
