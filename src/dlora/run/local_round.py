"""The local steps of a round, for all participants in this process: rows, learning rate,
dropout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dlora.data.batches import Batch, collate
from dlora.lora.active import Scheduled
from dlora.lora.factors import Zeros
from dlora.run.prepare import Prepared
from dlora.run.resting import Resting
from dlora.seeds import derive_seed
from dlora.train import Group, Participants, learning_rate, local_steps


class Training:
    """The participants of this process and their training: n peers, one real peer, or one pooled
    participant.

    The batch of the pooled participant joins the batches of all peers. If the run has several
    ranks, each takes the rows of its own peers, and they add their gradients up. What a round does
    follows from its number and the seed only, so no checkpoint holds it. ``local_steps``: of each
    participant of the run. ``zeros``: as for `Participants`.
    """

    def __init__(
        self,
        prepared: Prepared,
        local_steps: list[int],
        group_size: int,
        pooled: bool,
        scheduled: Scheduled | None = None,
        zeros: Zeros | None = None,
    ) -> None:
        self.prepared, self.local_steps, self.group_size, self.pooled = (
            prepared,
            local_steps,
            group_size,
            pooled,
        )
        self.tokens = 0  # tokens read so far, without padding
        # hears how many participants took a step
        self.on_step: Callable[[int], None] = lambda num_participants: None
        self.here = range(1) if pooled else prepared.here
        # whether only a part of the participants trains in a round
        self.some = prepared.config.peers.participation < 1 and not pooled
        # With a schedule each participant has moments of its own anyway, and through a cloud one
        # goes at a time: then each is a group, and its state rests there.
        stacked = scheduled is None and prepared.half is None
        groups = batch_groups(local_steps, group_size if stacked or not self.some else 1, self.here)
        self.participants = Participants(
            prepared.model.initial,
            groups,
            prepared.config.train,
            prepared.model.device,
            scheduled,
            zeros,
        )
        self.trained = {key: self.participants.factors[key] for key in prepared.trained}
        self.resting = (
            Resting(self.participants, prepared.config.train) if self.some and stacked else None
        )
        self._counted: dict[tuple[int, range], int] = {}

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimisers' state, for a checkpoint."""
        return (self.resting or self.participants).optimizer_state()

    def load(self, factors: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        """Take factors and optimiser state of a checkpoint."""
        if self.resting is None:
            self.participants.load(factors, optimizer_state)
            return
        self.participants.load(factors, {})
        self.resting.load(optimizer_state)

    def steps_here(self, rounds: int) -> int:
        """Local steps of all participants here in the first ``rounds`` rounds."""
        return self._steps(rounds, self.here)

    def steps_of_all(self, rounds: int) -> int:
        """Local steps of all participants of the run in the first ``rounds`` rounds."""
        return self._steps(rounds, range(len(self.local_steps)))

    def _steps(self, rounds: int, among: range) -> int:
        if not self.some:
            return rounds * sum(self.local_steps[number] for number in among)
        if (rounds, among) not in self._counted:
            self._counted[rounds, among] = sum(
                self.local_steps[number]
                for round in range(rounds)
                for number in self.prepared.drawn(round)
                if number in among
            )
        return self._counted[rounds, among]

    def round(self, number: int, names: frozenset[str]) -> Tensor:
        """The local steps of one round on the tensors ``names``, group after group.

        Returns the mean loss of each participant here, (P,); NaN for those that rest.
        """
        drawn = self.prepared.drawn(number) if self.some else self.here
        losses = (
            torch.cat(
                [self._group(number, names, group, drawn) for group in self.participants.groups]
            )
            if self.resting is None
            else self._some(number, names, self.resting, drawn)
        )
        self.prepared.model.passes_done(backward=True)
        return losses

    def _group(
        self, number: int, names: frozenset[str], group: Group, drawn: Sequence[int]
    ) -> Tensor:
        """The losses of a group that trains or rests as a whole."""
        if group.first in drawn:
            means = self._train(number, names, group, range(group.first, group.last))
            self.participants.rest(group)
            return means
        if group.units is not None:
            group.units.rest(group.optimizer, self.local_steps[group.first])
        return torch.full((group.last - group.first,), torch.nan)

    def _some(
        self, number: int, names: frozenset[str], resting: Resting, drawn: Sequence[int]
    ) -> Tensor:
        """As `round`, for the participants here that are ``drawn``."""
        losses = torch.full((len(self.here),), torch.nan)
        drawn = [peer for peer in drawn if peer in self.here]
        for steps in sorted({self.local_steps[peer] for peer in drawn}):
            alike = [peer for peer in drawn if self.local_steps[peer] == steps]
            for start in range(0, len(alike), self.group_size):
                group, members = resting.take(alike[start : start + self.group_size])
                mean = self._train(number, names, group, members)
                losses[[member - self.here.start for member in members]] = mean
                resting.put_back(group, members)
        return losses

    def _train(
        self, number: int, names: frozenset[str], group: Group, members: Sequence[int]
    ) -> Tensor:
        """The mean losses of one group whose participants are ``members``."""
        group.train_only(names)
        if self.prepared.config.train.optimizer_state == "reset":
            group.optimizer.state.clear()
        steps = self.local_steps[members[0]]
        processes = self.prepared.processes
        # processes that train one participant together draw a mask each
        drawn_for = self.prepared.here.start if self.pooled else members[0]
        drawn_by = (processes.rank,) if self.prepared.site.rank else ()
        with torch.random.fork_rng():
            torch.manual_seed(
                derive_seed(
                    self.prepared.config.seed,
                    "dropout",
                    number,
                    self.prepared.names[drawn_for],
                    *drawn_by,
                )
            )
            history = local_steps(
                self.prepared.model,
                group,
                self.batches(members, number, steps),
                self.learning_rates(number, steps),
                self.prepared.config.train,
                self.prepared.autocast_dtype,
                self.on_step,
                processes.add_up if self._joined else None,
            )
        return history.mean(dim=0)

    @property
    def _joined(self) -> bool:
        """Whether the processes of this run train the same participant."""
        return self.prepared.processes.are_several and (
            self.pooled or self.prepared.site.are_several
        )

    def learning_rates(self, number: int, steps: int) -> list[float]:
        """The learning rate of each of the ``steps`` local steps of a round."""
        section, start = self.prepared.config.train, number * steps
        return [
            learning_rate(section, step, section.rounds * steps)
            for step in range(start, start + steps)
        ]

    def batches(self, members: Sequence[int], number: int, steps: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step of round ``number`` for the participants ``members``.

        The pooled participant takes the rows of all peers that are drawn for the round, in portions
        that fit into memory. The processes of a site take a part of the rows each.
        """
        section = self.prepared.config.train
        rows = section.per_device_train_batch_size
        names, data, streams = self.prepared.names, self.prepared.data.peers, self.prepared.streams
        portions, start, site = [members], number * steps, self.prepared.site
        if self.pooled:
            here = [peer for peer in self.prepared.drawn(number) if peer in self.prepared.here]
            portions = [
                here[begin : begin + self.group_size]
                for begin in range(0, len(here), self.group_size)
            ]
        for micro_step in range(
            start * section.gradient_accumulation_steps,
            (start + steps) * section.gradient_accumulation_steps,
        ):
            if micro_step % section.gradient_accumulation_steps == 0:
                micro_batches: list[Batch] = []
            for portion in portions:
                chosen = [
                    data[names[peer]][row]
                    for peer in portion
                    for row in streams[peer].take(micro_step * rows, rows)
                ]
                self.tokens += sum(len(row.input_ids) for row in chosen)
                own = chosen[site.rank :: site.size]
                micro_batches.append(collate(own, self.prepared.pad_token_id))
            if (micro_step + 1) % section.gradient_accumulation_steps == 0:
                yield micro_batches


def batch_groups(local_steps: Sequence[int], group_size: int, here: range) -> list[range]:
    """Groups of at most ``group_size`` consecutive participants of ``here`` that have the same
    number of local steps.
    """
    groups, first = [], here.start
    for _, alike in itertools.groupby(local_steps[here.start : here.stop]):
        last = first + len(list(alike))
        groups += [
            range(start, min(start + group_size, last)) for start in range(first, last, group_size)
        ]
        first = last
    return groups
