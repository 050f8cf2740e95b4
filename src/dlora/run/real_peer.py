"""One real peer's run: training, messages and commits that the protocol is handed, and the scores
at the end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dlora.config.arms import DEC_LORA
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.peer.belief import Belief, copied
from dlora.decentralized.peer.exchange import Exchange
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.life import PeerGossip, Progress
from dlora.decentralized.peer.messages_on_disk import round_of
from dlora.decentralized.peer.patience import BEATS, Patience
from dlora.decentralized.peer.word import Signatures
from dlora.decentralized.topology import Topology
from dlora.errors import Interrupted, RunError
from dlora.evaluate import Scores, better
from dlora.events.log import read_log
from dlora.lora.adapter_io import save_adapter
from dlora.lora.factors import Factors
from dlora.net.grpc import GrpcNetwork
from dlora.net.transport import Talk
from dlora.run.findings import Findings
from dlora.run.folder import Checkpoint, environment, warn_of_another
from dlora.run.frozen_model import teller
from dlora.run.local_round import Training
from dlora.run.manifest import manifest_hash, manifest_text
from dlora.run.messages import decode_message, encode_message, message_sizes
from dlora.run.opening import OpenRun
from dlora.run.schedules import Schedules
from dlora.run.scoring import Scoring
from dlora.wire.frame import Link

RUN = DEC_LORA.name
LOOK_S = 0.2  # between two looks at what another thread has found out
# a link on which nothing is said yet; after net's FIRST_FRAME_S, 20, the other end would find that
# odd
HOLD_S = 10.0


class PeerRun:
    """The state of one peer between two rounds, on its disk after each.

    ``cloud_bytes`` counts what has gone to and from the cloud in this process, where the frozen
    model runs in one.
    """

    cloud_bytes: Callable[[], int] | None = None

    def __init__(
        self, run: OpenRun, ledger: Ledger, network: GrpcNetwork, signatures: Signatures
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
        self.signatures = signatures
        self.steps_done = 0
        # of who is active, not in the log yet: local steps are another thread's
        self.changes: list[dict[str, Any]] = []
        self.schedules = Schedules(
            RUN, prepared, lambda event, **fields: self.changes.append(fields)
        )
        self.training = Training(
            prepared, prepared.local_steps, 1, False, self._tick_step, self.schedules.scheduled
        )
        self.spent = run.spent(RUN)
        self.tokens_before: int | None = 0  # read in earlier processes
        self.scoring = Scoring(RUN, prepared, 1, self.schedules.scheduled, log, self.spent)
        self.findings = Findings(name, prepared.topology.num_peers, log.emit)
        self.progress = Progress()
        self.belief = Belief.of(
            prepared.trained, prepared.config.train.learning_rate * self.training.local_steps[0]
        )
        # the factors after the last round's local steps, until they are committed
        self.walked: Factors = {}
        self.round: dict[str, Any] = {}  # the last round's event
        self.trained_round: int | None = None  # since the last commit
        self.abandoned = False
        self.best: dict[str, Any] = {}
        self.seconds = 0.0  # of training and exchange, waiting included
        # on the wires, in earlier processes of this run
        self.bytes_before = self.cloud_bytes_before = 0
        self.cloud_is_away = False
        if stored is not None:
            self.training.participants.load(stored.factors, stored.optimizer)
            self.progress = Progress(**stored.state["progress"])
            ledger.check(
                self.progress.position, stored.state.get("chain"), self.progress.since_round
            )
            self.schedules.load(stored.state)
            # dlora 0.1.0 had none
            self.belief.load(stored.state.get("belief", {"way": 0.0, "rounds": 0, "seen": {}}))
            self.best, self.seconds = stored.state["best"], stored.state["seconds"]
            self.tokens_before = stored.state.get("tokens")
            self.bytes_before = stored.state["bytes_on_wire"]
            self.cloud_bytes_before = stored.state.get("cloud_bytes", 0)
            warn_of_another(stored.state["environment"], environment(1))
            self.round = stored.state["round"]
            self.steps_done = self.progress.rounds_done * self.training.local_steps[0]
        self.began_at = time.monotonic() - self.seconds
        self.loss = math.nan

    async def live(self, neighbours: list[str]) -> tuple[Factors, int]:
        """The run, while the network serves; returns the average of all and how many peers are in
        it.
        """
        config = self.prepared.config
        self.log.emit(
            "run",
            run=RUN,
            rounds=config.train.rounds,
            local_steps=self.training.local_steps,
            participants=1,
        )
        before = read_log(self.folder.log_path)
        self.schedules.tell(
            self.log.tick if any(event["event"] == "units" for event in before) else self.log.emit
        )
        if self.progress.rounds_done:
            logged = {event.get("round") for event in before if event["event"] == "round"}
            if self.round and self.round["round"] not in logged:
                # the kill came between the commit and its line
                self.log.emit("round", **self.round)
            self.log.emit("resumed", run=RUN, rounds_done=self.progress.rounds_done)
        exchange = Exchange(
            self.name,
            manifest_text(self.run.manifest),
            manifest_hash(self.run.manifest),
            self.ledger,
            neighbours,
            Patience(config.peers.silence_s, config.peers.round_limit_s),
            partial(message_sizes, self.prepared),
            self._check,
            self.findings,
            self.signatures,
        )
        gossip = PeerGossip(
            self.name,
            self.training.trained,
            self.prepared.topology,
            build_rule(config.peers),
            self.ledger,
            exchange,
            config.train.rounds,
            config.peers.catch_up_after,
            self._train,
            self._standing,
            partial(encode_message, self.prepared),
            partial(decode_message, self.prepared),
            self._commit,
            self._skip,
            time.time,
            self.progress,
        )
        ended = self.progress.rounds_done == config.train.rounds
        self.log.tick(
            "phase",
            text=(
                "finished; answering neighbours that are not"
                if ended
                else "waiting for the neighbours"
            ),
        )
        talk = (
            exchange.talk
            if self.cloud_bytes is None
            else partial(self._talk_unless_stuck, exchange.talk)
        )
        serving = asyncio.create_task(self.network.serve(talk))
        life = asyncio.create_task(gossip.run())
        stopping = asyncio.create_task(self._stopped_outside_a_round())
        # all but life end only with an error
        ends: list[asyncio.Future[Any]] = [exchange.failed, serving, stopping, life]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            consensus, num_peers = next(end for end in ends if end.done()).result()
        except ExceptionGroup as group:  # of the network's tasks: the first says it
            raise group.exceptions[0] from group
        finally:
            self.abandoned = True  # a second Ctrl-C need not wait for the local steps to end
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        self.abandoned = False  # there are scores to come, through the cloud perhaps
        device = self.prepared.model.device
        return (
            self.training.participants.factors
            | {name: tensor.to(device) for name, tensor in consensus.items()},
            num_peers,
        )

    def _standing(self) -> Factors:
        """What of the function as it stands is trained."""
        standing = self.training.participants.standing()
        return {name: standing[name] for name in self.training.trained}

    async def _stopped_outside_a_round(self) -> None:
        """Raise Interrupted when the user stops before the first local step or after the last:
        there is no round to finish.
        """
        while not self.stop() or (
            self.run.began and self.progress.rounds_done < self.prepared.config.train.rounds
        ):
            await asyncio.sleep(LOOK_S)
        raise Interrupted(
            f"{self.name} stopped while it waited for its neighbours; nothing was lost"
        )

    # The cloud of a device

    def hear_of_cloud(self, event: str, reason: str) -> None:
        """What `far_cloud` tells, in the thread that needs the cloud."""
        assert self.prepared.config.split is not None
        if event in ("cloud-lost", "cloud-silent", "cloud-back"):
            self.cloud_is_away = event != "cloud-back"
        teller(self.log, self.prepared.config.split.cloud)(event, reason)

    def gives_up(self) -> bool:
        """Whether a wait for the cloud is to end."""
        return self.stop() or self.abandoned

    async def _talk_unless_stuck(self, talk: Talk, name: str, link: Link) -> None:
        """Not a word while the cloud is away: who cannot go on is away too, and ``silence_s``
        bounds what that costs.

        New links are held for a while, so that there is one to speak on when the cloud is back.
        """
        clock, patience_s = asyncio.get_running_loop(), self.prepared.config.peers.silence_s
        held_until = clock.time() + min(HOLD_S, patience_s / BEATS)
        while self.cloud_is_away and clock.time() < held_until:
            await asyncio.sleep(LOOK_S)
        talking = asyncio.ensure_future(talk(name, link))
        try:
            while not self.cloud_is_away and not talking.done():
                await asyncio.wait({talking}, timeout=LOOK_S)
            if talking.done():
                talking.result()
        finally:
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)

    @property
    def _with_cloud(self) -> dict[str, int]:
        """Bytes with the cloud in all processes of the run, of a device."""
        return (
            {}
            if self.cloud_bytes is None
            else {"cloud_bytes": self.cloud_bytes_before + self.cloud_bytes()}
        )

    # What the protocol is handed

    async def _train(self, number: int, names: frozenset[str]) -> frozenset[str]:
        self.run.began = True
        every = self.prepared.config.eval_peers_every or self.prepared.config.eval_every
        due = number and every and number % every == 0
        if due and self.scoring.chosen:  # its own score: nobody has the average before the end
            own = await asyncio.to_thread(self._own_scores)
            self._emit_scores(None, own)
        before = copied(self.training.trained)
        with self.spent.on("training"):
            losses = await asyncio.to_thread(self.training.round, number, names)
        self.walked = copied(self.training.trained)
        self.belief.walked(before, self.walked)
        self.loss, self.trained_round = losses.item(), number
        self._log_changes()
        if not math.isfinite(self.loss):
            raise RunError(
                f"the loss of {self.name} is no number any more in round {number}; lower"
                " train.learning_rate and start anew in another output_dir"
            )
        return self.training.participants.took_part()[0]

    def _check(self, neighbour: str, message: str, path: Path) -> None:
        """Raise ValueError unless a neighbour's message is what its name says, Implausible unless
        it is to be believed.
        """
        came = decode_message(self.prepared, message, path)
        num_peers = came.pop("num_peers", None)
        own = self.training.trained if num_peers is None else self._standing()
        parts = num_peers.item() if num_peers is not None and message == "sum" else 1.0
        mean = {name: tensor / parts for name, tensor in came.items()}
        round = round_of(message)
        self.belief.judge(
            neighbour, self.prepared.config.train.rounds if round is None else round, own, mean
        )

    def _log_changes(self) -> None:
        for change in self.changes:
            self.log.emit("active", **change)
        self.changes.clear()

    def _commit(self, progress: Progress) -> None:
        """Factors, optimiser and progress to disk; then the round is done."""
        if not self.belief.holds(progress.rounds_done, self.walked, self.training.trained):
            raise RunError(
                f"{self.name} does not save round {progress.rounds_done}: what its neighbours sent"
                " took its factors further than any training does; start anew in another"
                " output_dir, without the member that log.jsonl names"
            )
        self.seconds = self._count_exchange()
        last, trained = self.prepared.config.train.rounds, self.trained_round
        if trained is not None:
            self.round = self._round_event(trained)
        state = {
            "progress": vars(progress),
            "chain": self.ledger.chain(progress.position),
            "bytes_on_wire": self._bytes_on_wire(),
            **self._with_cloud,
            "seconds": self.seconds,
            "spent_s": dict(self.spent.seconds),
            "tokens": self.tokens,
            "best": self.best,
            "belief": self.belief.state(),
            "round": self.round,
            **self.schedules.state(),
            "environment": environment(1),
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
        if trained is None:
            return  # no round: the peer caught up, or doubts were settled after the last
        self.trained_round, self.walked = None, {}
        self.log.emit("round", **self.round)
        if self.stop() and progress.rounds_done < last:
            raise Interrupted(
                f"{self.name} stopped after round {progress.rounds_done} of {last}, finished and"
                " saved"
            )

    def _count_exchange(self) -> float:
        """Seconds of the run so far; what nothing else took of them went into the exchange, waiting
        included.
        """
        seconds, counted = time.monotonic() - self.began_at, self.spent.seconds
        self.spent.add("exchange", max(0.0, seconds - sum(counted.values())))
        return seconds

    @property
    def tokens(self) -> int | None:
        """Read by the local steps, padding left out; None where a checkpoint does not say."""
        return None if self.tokens_before is None else self.tokens_before + self.training.tokens

    def _round_event(self, number: int) -> dict[str, Any]:
        """What the log says of a round; the commit holds it too, for a kill may come between the
        two.
        """
        return {
            "run": RUN,
            "round": number,
            "loss": self.loss,
            "losses": [self.loss],
            "learning_rate": self.training.learning_rates(number, self.training.local_steps[0])[-1],
            "consensus_distance": None,
            "bytes_on_wire": self._bytes_on_wire(),
            **self._with_cloud,
            "seconds": self.seconds,
        }

    def _skip(self, rounds: int) -> None:
        """The peer takes its neighbours' state: moments begin anew, the schedule keeps its scores
        and goes to their round.
        """
        for group in self.training.participants.groups:
            group.optimizer.state.clear()
        self.schedules.skip(rounds)
        self._log_changes()

    # The end

    def finish(self, consensus: Factors, num_peers: int) -> dict[str, Any]:
        """Score and write the two adapters; returns the result that the summary shows."""
        self._count_exchange()
        standing = self.training.participants.standing()
        own = self._own_scores() if self.scoring.chosen else None
        judged = self.scoring.average(consensus)
        average = judged.scores
        if not self.best or better(average, self.best):
            self.best = {"rounds_done": self.progress.rounds_done, **average}
        self._emit_scores(average, own)
        model, peers = self.prepared.model, self.folder.path / "peers"
        with self.spent.on("saving"):
            save_adapter(self.folder.path / "consensus", consensus, model, self.prepared.tokenizer)
            save_adapter(peers / self.name, standing, model, self.prepared.tokenizer)
        result = {
            "consensus": average,
            "peers_mean": own,
            "peers": {self.name: own} if own else {},
            "best": self.best,
            "confusion": judged.confusion,
            "consensus_peers": num_peers,
            "warnings": self.findings.warnings(num_peers),
            "bytes_on_wire": self._bytes_on_wire(),
            **self.schedules.spent,
            **self._with_cloud,
            "consensus_distance": None,
            "seconds": self.seconds,
            "spent_s": dict(self.spent.seconds),
            "tokens": self.tokens,
            "tokens_per_second": None if self.tokens is None else self.tokens / self.seconds,
            "local_steps": self.training.local_steps,
            "edges": _edge_counts(
                self.name, self.prepared.topology, self.ledger, self.prepared.config.train.rounds
            ),
        }
        shown = {
            key: result[key] for key in ("consensus", "peers_mean", "bytes_on_wire", "seconds")
        }
        self.log.emit("run-done", run=RUN, **shown, **self._with_cloud)
        return result

    def _own_scores(self) -> Scores:
        return self.scoring.peers(self.training.participants.standing())[self.name]

    def _emit_scores(self, consensus: Scores | None, own: Scores | None) -> None:
        self.log.emit(
            "scores",
            run=RUN,
            rounds_done=self.progress.rounds_done,
            consensus=consensus,
            peers={self.name: own} if own else None,
            peers_mean=own,
            bytes_on_wire=self._bytes_on_wire(),
            **self._with_cloud,
            seconds=self.seconds,
        )

    def _bytes_on_wire(self) -> int:
        """Serialised frames this peer sent and received, in all processes of the run."""
        traffic = self.network.traffic
        return (
            self.bytes_before
            + sum(traffic.sent_bytes.values())
            + sum(traffic.received_bytes.values())
        )

    def _tick_step(self, num_participants: int) -> None:
        if self.abandoned:
            raise Interrupted("given up")
        self.steps_done += num_participants
        total = self.training.local_steps[0] * self.prepared.config.train.rounds
        self.log.tick("step", run=RUN, done=self.steps_done, total=total)


def _edge_counts(
    name: str, topology: Topology, ledger: Ledger, rounds: int
) -> dict[str, dict[str, int]]:
    """For each neighbour, how many of the run's rounds with it were mixed, left out, or are still
    in doubt.
    """
    index, committed = topology.names.index(name), ledger.committed()
    counts = {}
    for other in topology.all_neighbours(index):
        neighbour = topology.names[other]
        due = [round for round in range(rounds) if other in topology.neighbours(index, round)]
        mixed = sum((round, neighbour) in committed for round in due)
        doubts = len(ledger.in_doubt(neighbour))
        counts[neighbour] = {
            "mixed": mixed,
            "left_out": len(due) - mixed - doubts,
            "in_doubt": doubts,
        }
    return counts
