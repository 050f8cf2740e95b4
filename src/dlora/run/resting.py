"""Participants of which only some train in a round: the state of the others rests."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dlora.config.training import TrainSection
from dlora.lora.moments import Moments
from dlora.train import Group, Participants


class Resting:
    """The optimiser's state of all participants here, whoever trains in a round.

    A participant's moments and its number of steps stay as they are while it rests. ``state``: by
    name and key, (P, ...) each; ``step`` is (P,).
    """

    def __init__(self, participants: Participants, section: TrainSection) -> None:
        self.participants, self.section = participants, section
        self.state: dict[str, dict[str, Tensor]] = {}

    def take(self, members: Sequence[int]) -> tuple[Group, list[int]]:
        """A group of copies for the participants ``members``, and their order in it.

        Those that have taken equally many steps are together.
        """
        first = self.participants.first
        members = sorted(members, key=lambda member: (self._steps(member - first), member))
        rows = torch.tensor([member - first for member in members])
        factors = {
            name: tensor[rows.to(tensor.device)]
            for name, tensor in self.participants.factors.items()
        }
        spans, start = [], 0
        for _, alike in itertools.groupby(members, key=lambda one: self._steps(one - first)):
            stop = start + len(list(alike))
            spans.append(slice(start, stop))
            start = stop
        group = Group(factors, 0, len(members), self.section, spans=spans)
        for name in group.parameters:
            for span in spans if name in self.state else ():
                held, here = self.state[name], rows[span]
                if held["step"][here[0]] > 0:
                    group.optimizer.state[group.leaves[f"{name}@{span.start}"]] = {
                        key: value[here[0]].clone()
                        if key == "step"
                        else value[here.to(value.device)]
                        for key, value in held.items()
                    }
        return group, members

    @torch.no_grad()
    def put_back(self, group: Group, members: Sequence[int]) -> None:
        """Keep what the group, from `take`, has become."""
        rows = torch.tensor([member - self.participants.first for member in members])
        for name, tensor in self.participants.factors.items():
            tensor[rows.to(tensor.device)] = group.parameters[name].detach()
            for span in group.spans:
                state = group.optimizer.state.get(group.leaves[f"{name}@{span.start}"], {})
                for key, value in state.items():
                    held = self._held(name, key, value, len(tensor))
                    held[rows[span].to(held.device)] = value

    def optimizer_state(self) -> dict[str, Tensor]:
        """As `Participants.optimizer_state`; `step` has a number for each participant."""
        return {
            f"{self.participants.first}/{name}/{key}": value
            for name, held in self.state.items()
            for key, value in held.items()
        }

    def load(self, optimizer_state: Mapping[str, Tensor]) -> None:
        """Take the state of a checkpoint, whose blocks may be others."""
        first = self.participants.first
        moments = Moments(optimizer_state)
        for name, tensor in self.participants.factors.items():
            found = moments.of(name, range(first, first + len(tensor)))
            for key, value in found.items():
                self._held(name, key, value.to(tensor.device), len(tensor)).copy_(value)

    def _steps(self, row: int) -> tuple[float, ...]:
        """The steps of each tensor of a participant: under rule alternate they differ."""
        return tuple(float(held["step"][row]) for held in self.state.values())

    def _held(self, name: str, key: str, like: Tensor, count: int) -> Tensor:
        held = self.state.setdefault(name, {})
        if key not in held:
            zeros = self.participants.zeros
            held[key] = (
                like.new_zeros(count, *(() if key == "step" else like.shape[1:]))
                if zeros is None or key == "step"
                else zeros((count, *like.shape[1:]))
            )
        return held[key]
