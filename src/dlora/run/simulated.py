"""One run of a simulation, Dec-LoRA or a baseline, round after round until it is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.sparse import eye_array
from torch import Tensor

from dlora.config.arms import ARMS
from dlora.config.peers import PeersSection, TopologySection
from dlora.decentralized.gossip import Gossip
from dlora.decentralized.mixing import Rule, build_rule
from dlora.decentralized.peer.messages import WIRE_DTYPES
from dlora.decentralized.topology import Topology, build_topology
from dlora.errors import Interrupted, RunError
from dlora.events.kinds import Active
from dlora.lora.adapter_io import save_adapter
from dlora.lora.all_adapters import part_files, part_name, save_all
from dlora.lora.factors import Factors, average, consensus_distance, one
from dlora.net.between_ranks import BetweenRanks
from dlora.net.counting import MemoryTransport
from dlora.run.checkpoint_files import Checkpoint
from dlora.run.folder import ALL_ADAPTERS
from dlora.run.local_round import Training
from dlora.run.opening import OpenRun
from dlora.run.schedules import Schedules
from dlora.run.scoring import Scoring
from dlora.run.tally import Tally
from dlora.tasks.scores import Scored, Scores

# with more peers their adapters are in one file: a folder for each takes 10 ms, and `dlora export`
# makes it
MOST_FOLDERS = 64


class Run:
    """One arm of a simulation: its participants, its topology, and its state between two rounds.

    ``name``: of its arm. A pooled arm has one participant, whose batch joins the batches of all
    peers. ``cloud_bytes`` returns the bytes between devices and their cloud in this process; None
    without a cloud.

    Its attributes are the parts of a run, which each round needs together.
    """

    def __init__(
        self,
        name: str,
        run: OpenRun,
        cloud_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.name, self.prepared, self.folder, self.log = name, run.prepared, run.folder, run.log
        self.group_size, self.stop, self.spent = run.group_size, run.stop, run.spent(name)
        self.stored, self.ranks = run.stored[name], run.prepared.ranks
        prepared, log, group_size, zeros = run.prepared, run.log, run.group_size, run.zeros
        self.arm = ARMS[name]
        config = prepared.config
        self.local_steps = self._local_steps()
        # what the schedules of the other ranks did; the main rank's log has it after the round
        self.news: list[Active] = []
        emit = log.emit if prepared.ranks.is_main else self.news.append
        self.schedules = None if self.arm.baseline else Schedules(name, prepared, emit)
        self.scheduled = self.schedules.scheduled if self.schedules else None
        self.training = Training(
            prepared, self.local_steps, group_size, self.arm.pooled, self.scheduled, zeros
        )
        self.participants = self.training.participants
        wire, ranks = WIRE_DTYPES[config.peers.wire], prepared.ranks
        between = None
        if ranks.group is not None and not self.arm.pooled:
            blocks = ranks.blocks(len(prepared.names))
            between = BetweenRanks(blocks, ranks.rank, ranks.group, wire)
        self.transport = MemoryTransport(wire, between)
        self.trained = self.training.trained
        took_part = self._took_part if self.scheduled else None
        self.gossip = Gossip(
            self.trained,
            self._topology(),
            self._rule(),
            self.transport,
            self.transport.wire,
            took_part,
            overlap=config.peers.overlap and self.arm.talks == "as configured",
            here=self.training.here,
            drawn=prepared.drawn if self.training.some else None,
            zeros_like=(
                torch.zeros_like if zeros is None else (lambda tensor: zeros(tensor.shape))
            ),
        )
        self.rounds_done = 0
        self.scoring = Scoring(name, prepared, group_size, self.scheduled, log, self.spent)
        self.tally = Tally(
            name,
            log,
            self.spent,
            self.training,
            self.schedules,
            config.train.rounds,
            lambda: self.transport.bytes_on_wire,
            cloud_bytes,
        )
        self.training.on_step = self.tally.step

    @property
    def seconds(self) -> float:
        """Seconds of training and exchange, without scoring and saving."""
        return self.spent.seconds["training"] + self.spent.seconds["exchange"]

    def result(self) -> dict[str, Any]:
        """Run the rounds that are left, save and score; returns the result for the summary.

        It goes on from the last checkpoint. Raises Interrupted if it was told to stop, RunError if
        a loss is not finite.
        """
        config, stored = self.prepared.config, self.stored
        if stored is not None:
            self._restore(stored)
        self.tally.begin()
        if self.schedules is not None:  # a resumed run has these events in its log already
            self.schedules.tell(self.log.emit if stored is None else self.log.tick)
        if stored is not None:
            self.tally.resumed(self.rounds_done)
            if "scores_due" in stored.state:
                self._score(peers=stored.state["scores_due"])
        else:
            self._score(peers=False)
        while self.rounds_done < config.train.rounds:
            self._round()
            self._after_round()
        self.gossip.settle()
        consensus, peers = self._score(peers=True)
        if not self.arm.baseline:
            with self.spent.on("saving"):
                self._write_adapters()
        steps = self.training.steps_of_all(config.train.rounds)
        apart = self._consensus_distance()
        result = self.tally.done(consensus, peers, len(self.local_steps), apart, self.seconds) | {
            "participant_steps_per_second": steps / self.seconds
        }
        self.folder.finish(
            self.name, self.rounds_done, {"result": result, "log_position": self.log.position}
        )
        return result

    # What all ranks compute together

    def _losses(self, here: Tensor) -> Tensor:
        """The losses of all participants, from those of the participants here."""
        if self.arm.pooled:  # all ranks trained this one participant
            return here
        return torch.tensor(self.ranks.joined(here.tolist()))

    def _took_part(self) -> list[frozenset[str]]:
        return self.ranks.joined(self.participants.took_part())

    def _average(self, factors: Mapping[str, Tensor]) -> Factors:
        """The mean over the participants of all ranks, (1, ...) each."""
        mean = average(factors)
        if self.ranks.are_several and not self.arm.pooled:
            share = len(self.training.here) / len(self.local_steps)
            mean = {name: tensor * share for name, tensor in mean.items()}
            self.ranks.add_up(list(mean.values()))
        return mean

    def _consensus_distance(self) -> float:
        apart = consensus_distance(self.trained, self._average(self.trained))
        if self.arm.pooled:
            return apart
        return sum(self.ranks.gathered(apart * len(self.training.here))) / len(self.local_steps)

    def _share(self) -> None:
        """Learn what the other ranks did, for the log, the checkpoint and the scores."""
        self.tally.share()
        for event in self.ranks.joined(self.news):
            self.log.emit(event)
        self.news.clear()
        if self.schedules is not None:
            self.schedules.share()

    # Rounds

    def _round(self) -> None:
        with self.spent.on("exchange"):
            losses = self._losses(self.gossip.round(self.rounds_done, self._train))
            self._share()
            apart = self._consensus_distance()
        trained = self.gossip.drawn(self.rounds_done) if self.gossip.drawn else range(len(losses))
        names = self.gossip.topology.names
        if lost := ", ".join(names[one] for one in trained if not losses[one].isfinite()):
            raise self.ranks.told_once(
                RunError(
                    f"{self.name} diverged in round {self.rounds_done}: the loss of {lost} is no"
                    " number any more; lower train.learning_rate and start anew in another"
                    " output_dir"
                )
            )
        self.log.emit(self.tally.round(self.rounds_done, losses, apart, self.seconds))
        self.rounds_done += 1

    def _train(self, names: frozenset[str]) -> Tensor:
        with self.spent.on("training"):
            return self.training.round(self.rounds_done, names)

    def _local_steps(self) -> list[int]:
        """Local steps of each participant in a round.

        The pooled participant does as many as the peers do on average.
        """
        steps = self.prepared.local_steps
        return [round(sum(steps) / len(steps))] if self.arm.pooled else steps

    def _topology(self) -> Topology:
        """Who exchanges with whom: as configured, everybody (fedavg), or nobody."""
        if self.arm.talks == "as configured":
            return self.prepared.topology
        names = self.prepared.names
        if self.arm.talks == "with all":
            return build_topology(TopologySection(kind="complete"), None, names)
        alone = ("pooled",) if self.arm.pooled else names
        return Topology("alone", alone, (eye_array(len(alone)),))

    def _rule(self) -> Rule:
        """The configured rule for Dec-LoRA; the baselines are plain LoRA."""
        return build_rule(
            self.prepared.config.peers if self.arm.talks == "as configured" else PeersSection()
        )

    def _restore(self, stored: Checkpoint) -> None:
        self.training.load(stored.factors, stored.optimizer)
        device = self.prepared.model.device
        self.gossip.pending = {name: tensor.to(device) for name, tensor in stored.pending.items()}
        self.rounds_done = stored.rounds_done
        self.tally.load(stored.state, self.rounds_done, self.group_size)

    def _after_round(self) -> None:
        """Score and save if it is time; stop if asked to."""
        config, last = self.prepared.config, self.rounds_done == self.prepared.config.train.rounds
        peers = bool(config.eval_peers_every) and self.rounds_done % config.eval_peers_every == 0
        if not last and (
            peers or (config.eval_every and self.rounds_done % config.eval_every == 0)
        ):
            try:
                self._score(peers=peers)
            except Interrupted:
                self._save({"scores_due": peers})
                raise
        stopping = self.ranks.any(self.stop()) and not last
        if last or stopping or self.rounds_done % config.save_every == 0:
            self._save()
        if stopping:
            raise self.ranks.told_once(
                Interrupted(
                    f"{self.name} stopped after round {self.rounds_done} of {config.train.rounds},"
                    " finished and saved"
                )
            )

    def _save(self, due: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint; ``due``: what must be done before the next round."""
        with self.spent.on("saving"):
            factors, optimizer = self.participants.factors, self.training.optimizer_state()
            state = self.tally.state(self.seconds, self.group_size)
            state |= {"log_position": self.log.position, **(due or {})}
            pending = self.gossip.pending
            here = None if self.arm.pooled else self.training.here
            self.folder.save(
                self.name,
                Checkpoint(self.rounds_done, factors, optimizer, state, pending=pending, here=here),
            )

    def _score(self, peers: bool) -> tuple[Scored, dict[str, Scores]]:
        """Score the average and, if ``peers``, each peer that ``eval_peers`` names."""
        standing = self.participants.standing()
        try:
            consensus = self.scoring.average(self._average(standing), not self.rounds_done)
            own: dict[str, Scores] = {}
            # the average of one participant is the participant itself
            if peers and not self.arm.pooled and self.scoring.chosen:
                alone = len(self.local_steps) == 1
                own = (
                    {self.prepared.names[0]: consensus.scores}
                    if alone
                    else self.scoring.peers(standing)
                )
        except Interrupted as interrupted:
            done = (
                f"round {self.rounds_done} of {self.prepared.config.train.rounds} is finished and"
                " saved"
            )
            raise Interrupted(
                f"{interrupted}; {done if self.rounds_done else 'nothing was trained yet'}"
            ) from None
        num_peers = len(self.local_steps)
        self._share()  # a cloud moved bytes for the scores
        self.tally.scored(self.rounds_done, consensus.scores, own, num_peers, self.seconds)
        return consensus, own

    def _write_adapters(self) -> None:
        """The average by the main rank, and each peer by the rank that trained it."""
        prepared, path, ranks = self.prepared, self.folder.path, self.ranks
        model, factors = prepared.model, self.participants.standing()
        consensus = self._average(factors)
        names = [prepared.names[number] for number in prepared.here]
        many = len(prepared.names) > MOST_FOLDERS

        def begin() -> None:
            save_adapter(path / "consensus", consensus, model, prepared.tokenizer)
            for before in part_files(path, ALL_ADAPTERS):  # of other ranks, in an earlier process
                before.unlink()

        def write() -> None:
            if many:
                file = part_name(ALL_ADAPTERS, ranks.rank, ranks.size)
                save_all(path / file, factors, names)
                return
            for row, name in enumerate(names):
                save_adapter(path / "peers" / name, one(factors, row), model)

        ranks.on_main(begin)
        ranks.together(write)
