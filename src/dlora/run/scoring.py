"""Which participants of a run are scored, and how many of them in one forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from torch import Tensor

from dlora.config.run import Config
from dlora.errors import Interrupted
from dlora.events.kinds import Evaluating
from dlora.events.log import RunLog
from dlora.lora.active import Scheduled
from dlora.lora.factors import digest
from dlora.run.prepare import Prepared
from dlora.run.spent import Spent
from dlora.seeds import derive_seed
from dlora.tasks.scores import Scored, Scores


class Scoring:
    """The scores of one run's participants.

    A listener may raise an error to end the scoring, because it can be repeated at any time.
    ``evaluate``: scores factors as `Prepared.evaluate` does; None: that one.
    """

    def __init__(
        self,
        run: str,
        prepared: Prepared,
        group_size: int,
        scheduled: Scheduled | None,
        log: RunLog,
        spent: Spent,
        evaluate: Callable[..., list[Scored]] | None = None,
    ) -> None:
        self.run, self.prepared, self.scheduled, self.log, self.spent = (
            run,
            prepared,
            scheduled,
            log,
            spent,
        )
        self.evaluate = evaluate or prepared.evaluate
        rows = len(prepared.data.evaluation) + sum(
            len(choice.options) for choice in prepared.data.choices
        )
        # A forward with several participants has no more rows than one of a single participant, so
        # it needs no more memory. A participant with enough rows for its own forward gets one: then
        # its scores do not depend on the others even in the last bit.
        self.at_once = max(1, min(group_size, prepared.config.per_device_eval_batch_size // rows))
        self.chosen = scored_peers(prepared.config, len(prepared.names))

    def average(self, factors: dict[str, Tensor], first: bool = False) -> Scored:
        """The scores of the average of all participants; ``factors`` are (1, ...) each.

        ``first``: nothing was trained yet. Such scores are computed once for all arms.
        """
        known = self.prepared.first_scores if first and self.prepared.half is None else {}
        if (key := digest(factors) if first else "") in known:
            return known[key]
        [known[key]] = self._scored(factors, "average", range(len(self.prepared.names)), dealt=True)
        return known[key]

    def peers(self, standing: dict[str, Tensor]) -> dict[str, Scores]:
        """The scores of each peer that ``eval_peers`` asks for, by name.

        ``standing``: the factors of the peers here, (P, ...) each. Each rank scores its own peers.
        """
        names, here, own = self.prepared.names, self.prepared.here, dict[str, Scores]()
        chosen = [peer for peer in self.chosen if peer in here]
        for start in range(0, len(chosen), self.at_once):
            group = chosen[start : start + self.at_once]
            rows = [peer - here.start for peer in group]
            which: slice | list[int] = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows
            factors = {name: tensor[which] for name, tensor in standing.items()}
            what = (
                names[group[0]] if len(group) == 1 else f"{names[group[0]]} to {names[group[-1]]}"
            )
            scored = self._scored(factors, what, group)
            own.update({names[peer]: one.scores for peer, one in zip(group, scored, strict=True)})
        with self.spent.on("scoring"):
            if self.prepared.ranks.are_several:
                self.prepared.model.passes_done(backward=False)
            return dict(self.prepared.ranks.joined(own.items()))

    def _scored(
        self, factors: dict[str, Tensor], what: str, whose: Sequence[int], dealt: bool = False
    ) -> list[Scored]:
        def heard(done: int, total: int) -> None:
            event = Evaluating(event="evaluating", run=self.run, what=what, done=done, total=total)
            try:
                self.log.tick(event)
            except Interrupted:
                # the other ranks would wait for this one, so it ends after the round
                if not self.prepared.processes.are_several:
                    raise

        with self.spent.on("scoring"):
            killed = self.scheduled.killed(whose) if self.scheduled else frozenset()
            return self.evaluate(factors, heard, killed, dealt)


def scored_peers(config: Config, num_peers: int) -> list[int]:
    """The indices of the peers that get their own scores: all, none, or a sample.

    The seed draws the sample, which is the same during the whole run.
    """
    if config.eval_peers == "none":
        return []
    if config.eval_peers == "all" or config.eval_peers >= num_peers:
        return list(range(num_peers))
    draw = random.Random(derive_seed(config.seed, "eval_peers"))
    return sorted(draw.sample(range(num_peers), config.eval_peers))
