"""One real peer's run: local steps, exchanges and checkpoints, and the scores at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from functools import partial
from typing import Any, cast

import torch

from dlora.decentralized.peer.belief import Belief
from dlora.decentralized.peer.life import Progress
from dlora.errors import Interrupted, RunError
from dlora.events.kinds import Phase, RoundDone
from dlora.events.log import read_log
from dlora.lora.adapter_io import save_adapter
from dlora.lora.factors import Factors
from dlora.net.transport import Talk
from dlora.run.checkpoint_files import Checkpoint
from dlora.run.cloud_of_a_peer import CloudOfAPeer
from dlora.run.findings import Findings, edge_counts
from dlora.run.membership import Membership
from dlora.run.opening import OpenRun
from dlora.run.place import Place
from dlora.run.scoring import Scoring
from dlora.run.site import RUN, Site
from dlora.run.tally import Tally
from dlora.tasks.scores import Scores


class PeerRun:
    """The state of one peer between two rounds; it is on disk after each round.

    Its attributes are the parts of a run, which each round needs together.
    """

    def __init__(self, run: OpenRun, site: Site, place: Place) -> None:
        self.site, self.training, self.schedules = site, site.training, site.schedules
        self.run, self.place, self.prepared, self.folder = run, place, run.prepared, run.folder
        self.log, self.stop, self.name = run.log, run.stop, place.name
        prepared, log, stored = run.prepared, run.log, run.stored[RUN]
        self.spent = run.spent(RUN)
        self.tally = Tally(
            RUN,
            log,
            self.spent,
            self.training,
            self.schedules,
            prepared.config.train.rounds,
            self._bytes_here,
        )
        self.training.on_step = self._step
        self.scoring = Scoring(
            RUN, prepared, 1, self.schedules.scheduled, log, self.spent, site.evaluate
        )
        split = prepared.config.split
        self.cloud = None if split is None else CloudOfAPeer(log, split.cloud)
        # of the last checkpoint
        self.progress, self.under_way = Progress(), False
        self.round: RoundDone | None = None  # the last round's event
        # the number and the losses of local steps that no checkpoint holds yet
        self.trained: tuple[int, torch.Tensor] | None = None
        self.membership: Membership | None = None  # while it takes part
        self.taken: Factors = {}  # what the exchange under way began with
        self.seconds = 0.0  # seconds of training and exchange, with the waiting
        if stored is not None:
            self.progress = Progress(**stored.state["progress"])
            self.under_way = stored.state.get("under_way") is not None
            self.tally.load(stored.state, self.rounds_trained, 1)
            self.seconds = stored.state["seconds"]
            if before := stored.state["round"]:  # dlora 0.1.0 did not write the kind beside it
                self.round = cast(RoundDone, {"event": "round", **before})
        self.began_at = time.monotonic() - self.seconds

    @property
    def rounds_trained(self) -> int:
        """The rounds whose local steps are in the last checkpoint."""
        return self.progress.rounds_done + self.under_way

    @property
    def findings(self) -> Findings:
        """What was found about the neighbours."""
        assert self.membership is not None
        return self.membership.findings

    def live(self) -> tuple[Factors, int]:
        """Run all rounds that are left while the network serves.

        Returns the average of all peers, (1, ...) each, and how many peers are in it.
        """
        self.tally.begin()
        before = read_log(self.folder.log_path)
        self.schedules.tell(
            self.log.tick if any(event["event"] == "units" for event in before) else self.log.emit
        )
        if self.rounds_trained:
            logged = {event.get("round") for event in before if event["event"] == "round"}
            if self.round and self.round["round"] not in logged:
                # the process was killed between the checkpoint and its line in the log
                self.log.emit(self.round)
            self.tally.resumed(self.rounds_trained)
        self.log.tick(Phase(event="phase", text=self._waiting_for()))
        rate, stored = self.prepared.config.train.learning_rate, self.run.stored[RUN]
        self.membership = membership = Membership(
            self.place,
            self.training.trained,
            Belief.of(self.prepared.trained, rate * self.training.local_steps[0]),
            stored.state if stored else None,
            self.training.participants.standing,
            self._around,
        )
        with contextlib.closing(membership):
            self._take_part(membership)
            self._copy()
            consensus, num_peers = membership.average(self.taken, self._look)
            self._add_mixed(membership)
            self._save(membership)
        device = self.prepared.model.device
        return (
            self.training.participants.factors
            | {name: tensor.to(device) for name, tensor in consensus.items()},
            num_peers,
        )

    def _take_part(self, membership: Membership) -> None:
        """Dec-LoRA's rounds: local steps, then the exchange of what they made.

        With overlap, the exchange runs while the next round's local steps do. A checkpoint is
        written before an exchange begins, so that nobody has heard of a message that a checkpoint
        does not know.
        """
        overlap = self.prepared.config.peers.overlap
        self._copy()
        membership.join(self._look)
        if self._add_mixed(membership):  # nobody may mix with a state that no checkpoint holds
            self._save(membership)
        if membership.under_way is not None:  # the exchange that the checkpoint tells of
            self._copy()
            membership.begin(self.taken, membership.under_way)
        while membership.has_rounds_left:
            older = membership.progress  # of the older of two checkpoints
            sent = self._train(membership.rounds_begun, membership.names)
            if overlap:
                self._end_exchange(membership)
            self._copy()
            membership.walked(self.taken)
            if overlap:
                self._save(membership, sent)
            membership.begin(self.taken, sent)
            if not overlap:
                self._end_exchange(membership)
                self._save(membership)
            membership.confirm(older)
        if membership.under_way is not None:
            self._end_exchange(membership)
            self._save(membership)

    def _copy(self) -> None:
        """Copy the factors as they are now, on the CPU."""
        trained = self.training.trained
        self.taken = {name: tensor.to("cpu", copy=True) for name, tensor in trained.items()}

    def _end_exchange(self, membership: Membership) -> None:
        """Wait for the exchange under way, if there is one, and add what it changed."""
        if membership.end() is not None:
            self._add_mixed(membership)

    def _add_mixed(self, membership: Membership) -> int:
        """Add to the factors what has changed in the membership's since they were copied.

        Returns how many rounds were skipped.
        """
        for name, tensor in self.training.trained.items():
            tensor.copy_(tensor.cpu() - self.taken[name] + membership.factors[name])
        skipped, membership.skipped = membership.skipped, 0
        if skipped:
            self.site.skip(skipped)
        return skipped

    def _around(self, talk: Talk) -> Talk:
        if self.cloud is None:
            return talk
        silence_s = self.prepared.config.peers.silence_s
        return partial(self.cloud.talk_unless_away, talk, silence_s)

    def _waiting_for(self) -> str:
        ended = self.progress.rounds_done == self.prepared.config.train.rounds
        return (
            "finished; answering neighbours that are not" if ended else "waiting for the neighbours"
        )

    def _look(self) -> None:
        """Raise Interrupted if the user stops while nothing is under way."""
        if self.stop():
            raise Interrupted(
                f"{self.name} stopped while it waited for its neighbours; nothing was lost"
            )

    def gives_up(self) -> bool:
        """Whether a wait for the cloud must end."""
        return self.stop() or (self.membership is not None and self.membership.steps.has_failed)

    def _train(self, number: int, names: frozenset[str]) -> frozenset[str]:
        """Take the local steps of a round; returns the tensors that took part."""
        self.run.began = True
        every = self.prepared.config.eval_peers_every or self.prepared.config.eval_every
        due = number and every and number % every == 0
        if due and self.scoring.chosen:  # only its own score: the average exists only at the end
            own = self._own_scores()
            self.tally.scored(number, None, own, 1, self.seconds)
        with self.spent.on("training"):
            losses = self.site.train(number, names)
        if not losses.isfinite().all():
            raise RunError(
                f"the loss of {self.name} is no number any more in round {number}; lower"
                " train.learning_rate and start anew in another output_dir"
            )
        self.trained = (number, losses)
        return self.training.participants.took_part()[0]

    def _save(self, membership: Membership, under_way: Collection[str] | None = None) -> None:
        """Write factors, optimiser and progress to disk; then the round is done.

        ``under_way``: the tensors that an exchange sends that is about to begin.
        """
        self.seconds, trained = self._count_exchange(), self.trained
        if trained is not None:
            self.round = self.tally.round(*trained, None, self.seconds)
        state = self.tally.state(self.seconds, 1) | membership.state(under_way)
        # a kill may come between the checkpoint and its line in the log
        state["round"] = self.round
        progress, taking_part = membership.progress, self.training.participants
        with self.spent.on("saving"):
            self.folder.save(
                RUN,
                Checkpoint(
                    progress.rounds_done, taking_part.factors, taking_part.optimizer_state(), state
                ),
            )
        self.progress, self.under_way = progress, state["under_way"] is not None
        if trained is None or self.round is None:
            return  # no round: doubts were settled after the last
        self.trained = None
        self.log.emit(self.round)
        last = self.prepared.config.train.rounds
        if self.stop() and self.rounds_trained < last:
            raise Interrupted(
                f"{self.name} stopped after round {self.rounds_trained} of {last}, finished and"
                " saved"
            )

    def _count_exchange(self) -> float:
        """Seconds of the run so far.

        The time that nothing else took counts as exchange, with the waiting.
        """
        seconds, counted = time.monotonic() - self.began_at, self.spent.seconds
        self.spent.add("exchange", max(0.0, seconds - sum(counted.values())))
        return seconds

    # The end

    def finish(self, consensus: Factors, num_peers: int) -> dict[str, Any]:
        """Score, and write the two adapters; returns the result for the summary."""
        self._count_exchange()
        standing = self.training.participants.standing()
        own = self._own_scores() if self.scoring.chosen else {}
        judged = self.scoring.average(consensus)
        rounds_done = self.progress.rounds_done
        self.tally.scored(rounds_done, judged.scores, own, 1, self.seconds)
        model, peers = self.prepared.model, self.folder.path / "peers"
        with self.spent.on("saving"):
            save_adapter(self.folder.path / "consensus", consensus, model, self.prepared.tokenizer)
            save_adapter(peers / self.name, standing, model, self.prepared.tokenizer)
        result: dict[str, Any] = self.tally.done(judged, own, 1, None, self.seconds)
        return result | {
            "consensus_peers": num_peers,
            "warnings": self.findings.warnings(num_peers),
            "edges": edge_counts(
                self.name, self.place.topology, self.place.ledger, self.place.messages.rounds
            ),
        }

    def _own_scores(self) -> dict[str, Scores]:
        return self.scoring.peers(self.training.participants.standing())

    def _bytes_here(self) -> int:
        """Bytes of the serialised frames that this peer sent and received in this process."""
        traffic = self.place.network.traffic
        return sum(traffic.sent_bytes.values()) + sum(traffic.received_bytes.values())

    def _step(self, num_participants: int) -> None:
        if self.membership is not None and not self.site.processes.are_several:
            self.membership.steps.check()  # in a site, the others wait in the middle of a step
        self.tally.step(num_participants)
