"""The processes that train one real peer: the first of them leads, the others follow it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from dlora.config.arms import DEC_LORA
from dlora.lora.factors import Factors
from dlora.run.local_round import Training
from dlora.run.opening import OpenRun
from dlora.run.schedules import Schedules
from dlora.tasks.scores import Scored

RUN = DEC_LORA.name
T = TypeVar("T")


class Site:
    """The training of one real peer, in one process or in all that torchrun started.

    The first process leads: it has the links, the log and the checkpoints, and calls `train`,
    `evaluate` and `skip` inside of `leading`. The others call `follow`, which does the same until
    the leader has ended. Each process takes a part of the rows of each batch, and their gradients
    are added up, so all have the same factors and moments.
    """

    def __init__(self, run: OpenRun) -> None:
        self.prepared, self.processes = run.prepared, run.prepared.site
        self.schedules = Schedules(RUN, run.prepared, run.log.emit)
        self.training = Training(
            run.prepared, run.prepared.local_steps, 1, False, self.schedules.scheduled
        )
        self._stored = run.stored[RUN]
        if self._stored is not None:
            self.training.participants.load(self._stored.factors, self._stored.optimizer)
        self._busy = False  # the others wait in the middle of an action

    def train(self, number: int, names: frozenset[str]) -> Tensor:
        """Take the local steps of round ``number`` on ``names``; the mean loss, (1,)."""
        return self._all(self._train, number, names)

    def evaluate(
        self,
        factors: Factors,
        on_batch: Callable[[int, int], None],
        killed: frozenset[int],
        dealt: bool,
    ) -> list[Scored]:
        """As `Prepared.evaluate`; each process takes a part of the rows."""
        return self._all(self._evaluate, killed, here=(factors, on_batch))

    def skip(self, rounds: int) -> None:
        """Go on after rounds that were skipped: the moments begin anew, the schedule keeps its
        scores.
        """
        self._all(self._skip, rounds)

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """The other processes end with this one, and with the same error if it has one."""
        try:
            yield
        except BaseException as error:
            if self.processes.are_several and not self._busy:
                raised = error
                self.processes.on_main(lambda: _raise(raised))
            raise
        self.processes.on_main(lambda: None)

    def follow(self) -> None:
        """Do what the leader does until it has ended. Raises the leader's error."""
        if self._stored is not None:
            self.schedules.load(self._stored.state)
        while asked := self.processes.on_main(lambda: None):
            action, facts = asked
            getattr(self, action)(*facts)

    def _all(self, action: Callable[..., T], *facts: Any, here: tuple[Any, ...] = ()) -> T:
        """Call a method in every process, which `follow` finds by its name; ``here``: what only the
        leader has.
        """
        self.processes.on_main(lambda: (action.__name__, facts))
        self._busy = True
        result = action(*facts, *here)
        self._busy = False
        return result

    # In every process

    def _train(self, number: int, names: frozenset[str]) -> Tensor:
        self.processes.shared(self.training.trained)  # mixing has changed them in the leader
        return self.training.round(number, names)

    def _evaluate(
        self,
        killed: frozenset[int],
        factors: Mapping[str, Tensor] | None = None,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Scored]:
        held = self.training.participants.factors
        scored = factors or {name: torch.empty_like(tensor) for name, tensor in held.items()}
        self.processes.shared(dict(scored))
        return self.prepared.evaluate(scored, on_batch, killed, dealt=True)

    def _skip(self, rounds: int) -> None:
        for group in self.training.participants.groups:
            group.optimizer.state.clear()
        self.schedules.skip(rounds)


def _raise(error: BaseException) -> None:
    raise error
