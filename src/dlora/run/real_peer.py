"""One real peer's run: training, messages and commits that the protocol is handed, and the scores
at the end.
"""

from __future__ import annotations

import contextlib
import math
import time
from functools import partial
from typing import Any, cast

import torch

from dlora.config.arms import DEC_LORA
from dlora.decentralized.peer.belief import Belief, copied
from dlora.decentralized.peer.check import Check
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.life import PeerGossip, Progress
from dlora.decentralized.peer.word import Signatures
from dlora.errors import Interrupted, RunError
from dlora.evaluate import Scores
from dlora.events.kinds import Active, Phase, RoundDone
from dlora.events.log import read_log
from dlora.lora.adapter_io import save_adapter
from dlora.lora.factors import Factors
from dlora.net.loop_thread import LoopThread
from dlora.net.transport import Network, Talk
from dlora.run.cloud_of_a_peer import CloudOfAPeer
from dlora.run.findings import Findings, edge_counts
from dlora.run.folder import Checkpoint
from dlora.run.local_round import Training
from dlora.run.membership import Membership, make_gossip
from dlora.run.opening import OpenRun
from dlora.run.schedules import Schedules
from dlora.run.scoring import Scoring
from dlora.run.tally import Tally

RUN = DEC_LORA.name


class PeerRun:
    """The state of one peer between two rounds; it is on disk after each round.

    It is one class because the protocol calls its methods in turn, and they share the state of one
    round.
    """

    def __init__(
        self,
        run: OpenRun,
        ledger: Ledger,
        network: Network,
        signatures: Signatures,
        loop: LoopThread,
    ) -> None:
        assert run.own is not None
        self.run, self.name, self.prepared, self.folder = (
            run,
            run.own,
            run.prepared,
            run.folder,
        )
        self.log, self.stop, self.ledger, self.network = run.log, run.stop, ledger, network
        name, prepared, log, stored = run.own, run.prepared, run.log, run.stored[RUN]
        self.signatures, self.loop = signatures, loop
        # changes of the active set that are not in the log yet, because local steps run in another
        # thread
        self.changes: list[Active] = []
        self.schedules = Schedules(RUN, prepared, self.changes.append)
        self.training = Training(prepared, prepared.local_steps, 1, False, self.schedules.scheduled)
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
        self.scoring = Scoring(RUN, prepared, 1, self.schedules.scheduled, log, self.spent)
        split = prepared.config.split
        self.cloud = None if split is None else CloudOfAPeer(log, split.cloud)
        self.findings = Findings(name, prepared.topology.num_peers, log.emit)
        self.progress = Progress()
        self.belief = Belief.of(
            prepared.trained, prepared.config.train.learning_rate * self.training.local_steps[0]
        )
        # the factors after the last round's local steps, until they are committed
        self.walked: Factors = {}
        self.round: RoundDone | None = None  # the last round's event
        self.trained_round: int | None = None  # the round that was trained since the last commit
        self.membership: Membership | None = None  # while it takes part
        self.seconds = 0.0  # seconds of training and exchange, with the waiting
        if stored is not None:
            self.training.participants.load(stored.factors, stored.optimizer)
            self.progress = Progress(**stored.state["progress"])
            ledger.check(
                self.progress.position, stored.state.get("chain"), self.progress.since_round
            )
            self.tally.load(stored.state, self.progress.rounds_done, 1)
            # dlora 0.1.0 had no belief in its checkpoints
            self.belief.load(stored.state.get("belief", {"way": 0.0, "rounds": 0, "seen": {}}))
            self.seconds = stored.state["seconds"]
            if before := stored.state["round"]:  # dlora 0.1.0 did not write the kind beside it
                self.round = cast(RoundDone, {"event": "round", **before})
        self.began_at = time.monotonic() - self.seconds
        self.losses = torch.full((1,), math.nan)

    def live(self) -> tuple[Factors, int]:
        """Run all rounds that are left while the network serves.

        Returns the average of all peers, (1, ...) each, and how many peers are in it.
        """
        self.tally.begin()
        before = read_log(self.folder.log_path)
        self.schedules.tell(
            self.log.tick if any(event["event"] == "units" for event in before) else self.log.emit
        )
        if self.progress.rounds_done:
            logged = {event.get("round") for event in before if event["event"] == "round"}
            if self.round and self.round["round"] not in logged:
                # the process was killed between the commit and its line in the log
                self.log.emit(self.round)
            self.tally.resumed(self.progress.rounds_done)
        self.log.tick(Phase(event="phase", text=self._waiting_for()))
        self.membership = Membership(self.loop, self._gossip, self.network, self._around)
        with contextlib.closing(self.membership):
            gossip, wait = self.membership.gossip, self.membership.wait
            wait(gossip.join(), self._look)
            while gossip.has_rounds_left:
                names = wait(gossip.begin_round())
                older = Progress(**vars(gossip.progress))  # of the older of two checkpoints
                wait(gossip.mix(self._train(older.rounds_done, names)))
                wait(gossip.confirm(older))
            consensus, num_peers = wait(gossip.finish(), self._look)
        device = self.prepared.model.device
        return (
            self.training.participants.factors
            | {name: tensor.to(device) for name, tensor in consensus.items()},
            num_peers,
        )

    def _gossip(self) -> PeerGossip:
        return make_gossip(
            self.prepared.config.peers,
            self.prepared.messages.rule,
            name=self.name,
            manifest=self.run.manifest,
            topology=self.prepared.topology,
            rounds=self.prepared.config.train.rounds,
            messages=self.prepared.messages,
            ledger=self.ledger,
            signatures=self.signatures,
            factors=self.training.trained,
            standing=self._standing,
            check=Check(
                self.prepared.messages, self.belief, lambda: self.training.trained, self._standing
            ),
            report=self.findings,
            commit=self._commit,
            skip=self._skip,
            progress=self.progress,
        )

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

    def _standing(self) -> Factors:
        """The trained tensors of the factors, without what a schedule has dropped."""
        standing = self.training.participants.standing()
        return {name: standing[name] for name in self.training.trained}

    def _look(self) -> None:
        """Raise Interrupted if the user stops while nothing is under way."""
        if self.stop():
            raise Interrupted(
                f"{self.name} stopped while it waited for its neighbours; nothing was lost"
            )

    def gives_up(self) -> bool:
        """Whether a wait for the cloud must end."""
        failed = self.membership is not None and self.membership.has_failed
        return self.stop() or failed

    # What the protocol is handed

    def _train(self, number: int, names: frozenset[str]) -> frozenset[str]:
        self.run.began = True
        every = self.prepared.config.eval_peers_every or self.prepared.config.eval_every
        due = number and every and number % every == 0
        if due and self.scoring.chosen:  # only its own score: the average exists only at the end
            own = self._own_scores()
            self.tally.scored(number, None, own, 1, self.seconds)
        before = copied(self.training.trained)
        with self.spent.on("training"):
            losses = self.training.round(number, names)
        self.walked = copied(self.training.trained)
        self.belief.walked(before, self.walked)
        self.losses, self.trained_round = losses, number
        self._log_changes()
        if not losses.isfinite().all():
            raise RunError(
                f"the loss of {self.name} is no number any more in round {number}; lower"
                " train.learning_rate and start anew in another output_dir"
            )
        return self.training.participants.took_part()[0]

    def _log_changes(self) -> None:
        for change in self.changes:
            self.log.emit(change)
        self.changes.clear()

    def _commit(self, progress: Progress) -> None:
        """Write factors, optimiser and progress to disk; then the round is done."""
        if not self.belief.holds(progress.rounds_done, self.walked, self.training.trained):
            raise RunError(
                f"{self.name} does not save round {progress.rounds_done}: what its neighbours sent"
                " took its factors further than any training does; start anew in another"
                " output_dir, without the member that log.jsonl names"
            )
        self.seconds = self._count_exchange()
        last, trained = self.prepared.config.train.rounds, self.trained_round
        if trained is not None:
            self.round = self.tally.round(trained, self.losses, None, self.seconds)
        state = self.tally.state(self.seconds, 1) | {
            "progress": vars(progress),
            "chain": self.ledger.chain(progress.position),
            "belief": self.belief.state(),
            "round": self.round,  # a kill may come between the commit and its line in the log
        }
        with self.spent.on("saving"):
            taking_part = self.training.participants
            self.folder.save(
                RUN,
                Checkpoint(
                    progress.rounds_done, taking_part.factors, taking_part.optimizer_state(), state
                ),
            )
        self.progress = Progress(**vars(progress))
        if trained is None or self.round is None:
            return  # no round: the peer caught up, or doubts were settled after the last
        self.trained_round, self.walked = None, {}
        self.log.emit(self.round)
        if self.stop() and progress.rounds_done < last:
            raise Interrupted(
                f"{self.name} stopped after round {progress.rounds_done} of {last}, finished and"
                " saved"
            )

    def _count_exchange(self) -> float:
        """Seconds of the run so far.

        The time that nothing else took counts as exchange, with the waiting.
        """
        seconds, counted = time.monotonic() - self.began_at, self.spent.seconds
        self.spent.add("exchange", max(0.0, seconds - sum(counted.values())))
        return seconds

    def _skip(self, rounds: int) -> None:
        """Skip ``rounds`` rounds after the peer has taken its neighbours' state.

        The optimiser's moments begin anew. The schedule keeps its scores and goes on to the new
        round.
        """
        for group in self.training.participants.groups:
            group.optimizer.state.clear()
        self.schedules.skip(rounds)
        self._log_changes()

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
                self.name, self.prepared.topology, self.ledger, self.prepared.config.train.rounds
            ),
        }

    def _own_scores(self) -> dict[str, Scores]:
        return self.scoring.peers(self.training.participants.standing())

    def _bytes_here(self) -> int:
        """Bytes of the serialised frames that this peer sent and received in this process."""
        traffic = self.network.traffic
        return sum(traffic.sent_bytes.values()) + sum(traffic.received_bytes.values())

    def _step(self, num_participants: int) -> None:
        if self.membership is not None:
            self.membership.check()
        self.tally.step(num_participants)
