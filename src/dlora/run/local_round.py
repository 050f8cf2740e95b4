"""The local steps of a round, for all participants in this process: rows, learning rate,
dropout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dlora.data.batches import Batch, collate
from dlora.lora.active import Scheduled
from dlora.run.prepare import Prepared
from dlora.seeds import derive_seed
from dlora.train import Group, Participants, learning_rate, local_steps


class Training:
    """The participants of this process and their training: n peers, one real peer, or one pooled
    participant.

    The batch of the pooled participant joins the batches of all peers. If the run has several
    ranks, each takes the rows of its own peers, and they add their gradients up. What a round does
    follows from its number and the seed only, so no checkpoint holds it. ``local_steps``: of each
    participant of the run.
    """

    def __init__(
        self,
        prepared: Prepared,
        local_steps: list[int],
        group_size: int,
        pooled: bool,
        scheduled: Scheduled | None = None,
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
        groups = batch_groups(local_steps, group_size, self.here)
        self.participants = Participants(
            prepared.model.initial, groups, prepared.config.train, prepared.model.device, scheduled
        )
        self.trained = {key: self.participants.factors[key] for key in prepared.trained}

    @property
    def steps_a_round(self) -> int:
        """Local steps of all participants here in a round."""
        return sum(self.local_steps[number] for number in self.here)

    def round(self, number: int, names: frozenset[str]) -> Tensor:
        """The local steps of one round on the tensors ``names``, group after group.

        Returns the mean loss of each participant here, (P,).
        """
        losses = []
        for group in self.participants.groups:
            group.train_only(names)
            if self.prepared.config.train.optimizer_state == "reset":
                group.optimizer.state.clear()
            steps = self.local_steps[group.first]
            with torch.random.fork_rng():
                torch.manual_seed(
                    derive_seed(
                        self.prepared.config.seed,
                        "dropout",
                        number,
                        self.prepared.names[
                            self.prepared.here.start if self.pooled else group.first
                        ],
                    )
                )
                history = local_steps(
                    self.prepared.model,
                    group,
                    self.batches(group, number * steps, steps),
                    self.learning_rates(number, steps),
                    self.prepared.config.train,
                    self.prepared.autocast_dtype,
                    self.on_step,
                    self.prepared.ranks.add_up if self.pooled else lambda tensors: None,
                )
            losses.append(history.mean(dim=0))
        return torch.cat(losses)

    def learning_rates(self, number: int, steps: int) -> list[float]:
        """The learning rate of each of the ``steps`` local steps of a round."""
        section, start = self.prepared.config.train, number * steps
        return [
            learning_rate(section, step, section.rounds * steps)
            for step in range(start, start + steps)
        ]

    def batches(self, group: Group, start: int, steps: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step.

        The pooled participant takes the rows of all peers, in portions that fit into memory.
        """
        section = self.prepared.config.train
        rows = section.per_device_train_batch_size
        names, data, streams = self.prepared.names, self.prepared.data.peers, self.prepared.streams
        portions = (
            batch_groups([0] * len(names), self.group_size, self.prepared.here)
            if self.pooled
            else [range(group.first, group.last)]
        )
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
                micro_batches.append(collate(chosen, self.prepared.pad_token_id))
                self.tokens += int(micro_batches[-1].attention_mask.sum())
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
