"""What a run has done so far, in figures, for its events, its checkpoints and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dlora.evaluate import better, mean_scores, standard_errors
from dlora.events.kinds import (
    ArmBegins,
    ArmDone,
    Cost,
    Resumed,
    RoundDone,
    RoundScored,
    Saved,
    StepDone,
)
from dlora.events.log import RunLog
from dlora.run.folder import environment, warn_of_another
from dlora.run.local_round import Training
from dlora.run.schedules import Schedules
from dlora.run.spent import Spent
from dlora.tasks.scores import Scored, Scores


class Tally:
    """The figures of one arm over all of its processes: bytes, seconds, tokens, steps, best scores.

    ``bytes_here``: serialised bytes that its participants sent to each other in this process; for a
    real peer, sent and received ones. ``cloud_bytes``: bytes between devices and their cloud in
    this process; None if no cloud takes part.

    Its attributes are the figures that it adds up.
    """

    def __init__(
        self,
        arm: str,
        log: RunLog,
        spent: Spent,
        training: Training,
        schedules: Schedules | None,
        rounds: int,
        bytes_here: Callable[[], int],
        cloud_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.arm, self.log, self.spent, self.training = arm, log, spent, training
        self.schedules, self.rounds = schedules, rounds
        self.best: dict[str, Any] = {}
        self.steps_done = 0  # local steps of the participants of this process
        self._bytes_here, self._bytes_before = bytes_here, 0
        self.cloud_bytes = cloud_bytes
        # earlier arms of this process may have used the cloud too
        self._cloud_bytes_begun = cloud_bytes() if cloud_bytes else 0
        self._cloud_bytes_before = 0
        # tokens read in earlier processes; None: their checkpoint does not say
        self._tokens_before: int | None = 0
        # what the other ranks have read and moved so far
        self._tokens_elsewhere = self._cloud_bytes_elsewhere = 0

    @property
    def tokens(self) -> int | None:
        """Tokens that the local steps of all participants have read, without padding; None: not
        known.
        """
        if self._tokens_before is None:
            return None
        return self._tokens_before + self.training.tokens + self._tokens_elsewhere

    def cost(self, seconds: float) -> Cost:
        """Bytes and seconds so far, as fields of an event, a checkpoint or a result."""
        cost = Cost(bytes_on_wire=self._bytes_before + self._bytes_here(), seconds=seconds)
        if self.cloud_bytes is not None:
            cost["cloud_bytes"] = (
                self._cloud_bytes_before + self._cloud_bytes_here() + self._cloud_bytes_elsewhere
            )
        return cost

    def share(self) -> None:
        """Learn from the other ranks what they have read and moved so far."""
        ranks = self.training.prepared.ranks
        own = (self.training.tokens, self._cloud_bytes_here())
        of_all = ranks.gathered(own)
        self._tokens_elsewhere = sum(tokens for tokens, _ in of_all) - own[0]
        self._cloud_bytes_elsewhere = sum(moved for _, moved in of_all) - own[1]

    def _cloud_bytes_here(self) -> int:
        return self.cloud_bytes() - self._cloud_bytes_begun if self.cloud_bytes else 0

    def load(self, state: Mapping[str, Any], rounds_done: int, group_size: int) -> None:
        """Take the figures of a checkpoint, as `state` returned them."""
        here = environment(group_size, self.training.prepared.ranks)
        warn_of_another(state["environment"], here)
        # dlora 0.1.0 also kept the scores of untrained factors
        self.best = state["best"] if state["best"].get("rounds_done") else {}
        self.steps_done = self.training.steps_here(rounds_done)
        self._tokens_before = state.get("tokens")
        self._bytes_before = state["bytes_on_wire"]
        self._cloud_bytes_before += state.get("cloud_bytes", 0)
        if self.schedules is not None:
            self.schedules.load(state)

    def state(self, seconds: float, group_size: int) -> dict[str, Any]:
        """All figures that change, for a checkpoint."""
        return {
            **self.cost(seconds),
            "spent_s": dict(self.spent.seconds),
            "tokens": self.tokens,
            "best": self.best,
            **(self.schedules.state() if self.schedules else {}),
            "environment": environment(group_size, self.training.prepared.ranks),
        }

    # Events

    def begin(self) -> None:
        """Write the event that the arm begins."""
        steps = self.training.local_steps
        self.log.emit(
            ArmBegins(
                event="run",
                run=self.arm,
                rounds=self.rounds,
                local_steps=steps,
                participants=len(steps),
            )
        )

    def resumed(self, rounds_done: int) -> None:
        """Write the event that the arm goes on after ``rounds_done`` rounds."""
        self.log.emit(Resumed(event="resumed", run=self.arm, rounds_done=rounds_done))

    def step(self, num_participants: int) -> None:
        """Count a local step of that many participants here, and tell the listeners."""
        self.steps_done += num_participants
        total = self.training.steps_here(self.rounds)
        self.log.tick(StepDone(event="step", run=self.arm, done=self.steps_done, total=total))

    def round(
        self, number: int, losses: Tensor, consensus_distance: float | None, seconds: float
    ) -> RoundDone:
        """The event of a finished round, for the log. ``losses``: one for each participant."""
        rates = self.training.learning_rates(number, self.training.local_steps[0])
        return RoundDone(
            event="round",
            run=self.arm,
            round=number,
            loss=losses.nanmean().item(),  # who rests in this round has none
            losses=losses.tolist(),
            learning_rate=rates[-1],
            consensus_distance=consensus_distance,
            **self.cost(seconds),
        )

    def scored(
        self,
        rounds_done: int,
        consensus: Scores | None,
        own: Mapping[str, Scores],
        num_peers: int,
        seconds: float,
    ) -> None:
        """Event scores; the best scores of an average that was trained are remembered.

        ``own``: of peers, by name, out of ``num_peers``.
        """
        if (
            consensus is not None
            and rounds_done
            and (not self.best or better(consensus, self.best, self.training.prepared.metric))
        ):
            self.best = {"rounds_done": rounds_done, **consensus}
        self.log.emit(
            RoundScored(
                event="scores",
                run=self.arm,
                rounds_done=rounds_done,
                consensus=consensus,
                peers=dict(own) or None,
                peers_mean=mean_scores(own) if own else None,
                peers_mean_error=standard_errors(own, num_peers),
                **self.cost(seconds),
            )
        )

    def done(
        self,
        consensus: Scored,
        own: Mapping[str, Scores],
        num_peers: int,
        consensus_distance: float | None,
        seconds: float,
    ) -> dict[str, Any]:
        """Event run-done; returns the result that the summary shows."""
        spent = self.schedules.spent if self.schedules else Saved()
        mean = mean_scores(own) if own else None
        cost = self.cost(seconds)
        result = {
            "consensus": consensus.scores,
            "peers_mean": mean,
            "peers_mean_error": standard_errors(own, num_peers),
            "peers": dict(own),
            "best": self.best,
            "confusion": consensus.confusion,
            **cost,
            **spent,
            "consensus_distance": consensus_distance,
            "spent_s": dict(self.spent.seconds),
            "tokens": self.tokens,
            "tokens_per_second": None if self.tokens is None else self.tokens / seconds,
            "local_steps": self.training.local_steps,
        }
        self.log.emit(
            ArmDone(
                event="run-done",
                run=self.arm,
                consensus=consensus.scores,
                peers_mean=mean,
                **cost,
                **spent,
            )
        )
        return result
