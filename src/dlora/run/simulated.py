"""One run of a simulation, Dec-LoRA or a baseline, round after round until it is scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dlora.config.arms import ARMS
from dlora.config.run import PeersSection, TopologySection
from dlora.decentralized.gossip import Gossip
from dlora.decentralized.mixing import Rule, build_rule
from dlora.decentralized.topology import Topology, build_topology
from dlora.errors import Interrupted, RunError
from dlora.evaluate import Scored, Scores, better, mean_scores, standard_errors
from dlora.lora.adapter_io import save_adapter
from dlora.lora.factors import average, consensus_distance, one
from dlora.net.counting import MemoryTransport
from dlora.run.folder import Checkpoint, environment, warn_of_another
from dlora.run.local_round import Training
from dlora.run.opening import OpenRun
from dlora.run.prepare import WIRE_DTYPES
from dlora.run.schedules import Schedules
from dlora.run.scoring import Scoring


class Run:
    """Who takes part, over which topology, and the state between two rounds.

    ``name``: of its arm. A pooled arm has one participant, whose batch is all peers' batches
    joined. ``cloud_bytes`` counts what has gone between devices and their cloud in this process,
    where there is one.
    """

    def __init__(
        self,
        name: str,
        run: OpenRun,
        cloud_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.name, self.prepared, self.folder, self.log = name, run.prepared, run.folder, run.log
        self.group_size, self.stop, self.spent = run.group_size, run.stop, run.spent(name)
        self.stored = run.stored[name]
        prepared, log, group_size = run.prepared, run.log, run.group_size
        self.arm = ARMS[name]
        config = prepared.config
        self.local_steps = self._local_steps()
        self.schedules = None if self.arm.baseline else Schedules(name, prepared, log.emit)
        self.scheduled = self.schedules.scheduled if self.schedules else None
        self.training = Training(
            prepared, self.local_steps, group_size, self.arm.pooled, self._tick_step, self.scheduled
        )
        self.participants = self.training.participants
        self.transport = MemoryTransport(WIRE_DTYPES[config.peers.wire])
        self.trained = self.training.trained
        took_part = self.participants.took_part if self.scheduled else None
        self.gossip = Gossip(
            self.trained,
            self._topology(),
            self._rule(),
            self.transport,
            self.transport.wire,
            took_part,
        )
        self.rounds_done = 0
        self.steps_done = 0  # local steps of all participants, for the progress bar
        # read in earlier processes; None where their checkpoint does not say
        self.tokens_before: int | None = 0
        self.best: dict[str, Any] = {}
        self.scoring = Scoring(name, prepared, group_size, self.scheduled, log, self.spent)
        self._cloud_bytes = cloud_bytes
        # of this run in earlier processes, less other runs'
        self._cloud_bytes_before = -cloud_bytes() if cloud_bytes else 0

    @property
    def seconds(self) -> float:
        """Of training and exchange, without scoring and saving."""
        return self.spent.seconds["training"] + self.spent.seconds["exchange"]

    @property
    def tokens(self) -> int | None:
        """Read by the local steps of all participants, padding left out."""
        return None if self.tokens_before is None else self.tokens_before + self.training.tokens

    @property
    def _with_cloud(self) -> dict[str, int]:
        """Bytes with the cloud, for a run that has one."""
        return (
            {}
            if self._cloud_bytes is None
            else {"cloud_bytes": self._cloud_bytes_before + self._cloud_bytes()}
        )

    def result(self) -> dict[str, Any]:
        """Go on from the last checkpoint, run what is left of the rounds, save, score; raises
        Interrupted when told to stop.
        """
        config, stored = self.prepared.config, self.stored
        if stored is not None:
            self._restore(stored)
        self.log.emit(
            "run",
            run=self.name,
            rounds=config.train.rounds,
            local_steps=self.local_steps,
            participants=len(self.local_steps),
        )
        if self.schedules is not None:  # a run that goes on has it in its log already
            self.schedules.tell(self.log.emit if stored is None else self.log.tick)
        if stored is not None:
            self.log.emit("resumed", run=self.name, rounds_done=self.rounds_done)
            if "scores_due" in stored.state:
                self._score(peers=stored.state["scores_due"])
        else:
            self._score(peers=False)
        while self.rounds_done < config.train.rounds:
            self._round()
            self._after_round()
        consensus, peers = self._score(peers=True)
        if not self.arm.baseline:
            with self.spent.on("saving"):
                self._write_adapters()
        spent = self.schedules.spent if self.schedules else {}
        result = {
            "consensus": consensus.scores,
            "peers_mean": mean_scores(peers) if peers else None,
            "peers_mean_error": standard_errors(peers, len(self.local_steps)),
            "peers": peers,
            "best": self.best,
            "confusion": consensus.confusion,
            "bytes_on_wire": self.transport.bytes_on_wire,
            **self._with_cloud,
            **spent,
            "consensus_distance": consensus_distance(self.trained),
            "seconds": self.seconds,
            "spent_s": dict(self.spent.seconds),
            "participant_steps_per_second": (
                config.train.rounds * sum(self.local_steps) / self.seconds
            ),
            "tokens": self.tokens,
            "tokens_per_second": None if self.tokens is None else self.tokens / self.seconds,
            "local_steps": self.local_steps,
        }
        shown = {
            key: result[key] for key in ("consensus", "peers_mean", "bytes_on_wire", "seconds")
        }
        self.log.emit("run-done", run=self.name, **shown, **self._with_cloud, **spent)
        self.folder.finish(
            self.name, self.rounds_done, {"result": result, "log_position": self.log.position}
        )
        return result

    def _round(self) -> None:
        with self.spent.on("exchange"):
            losses = self.gossip.round(self.rounds_done, self._train)
        if not losses.isfinite().all():
            lost = ", ".join(
                name
                for name, loss in zip(self.gossip.topology.names, losses.tolist(), strict=True)
                if not math.isfinite(loss)
            )
            raise RunError(
                f"{self.name} diverged in round {self.rounds_done}: the loss of {lost} is no number"
                " any more; lower train.learning_rate and start anew in another output_dir"
            )
        self.log.emit(
            "round",
            run=self.name,
            round=self.rounds_done,
            loss=losses.mean().item(),
            losses=losses.tolist(),
            learning_rate=self.training.learning_rates(self.rounds_done, self.local_steps[0])[-1],
            consensus_distance=consensus_distance(self.trained),
            bytes_on_wire=self.transport.bytes_on_wire,
            **self._with_cloud,
            seconds=self.seconds,
        )
        self.rounds_done += 1

    def _train(self, names: frozenset[str]) -> Tensor:
        with self.spent.on("training"):
            return self.training.round(self.rounds_done, names)

    def _local_steps(self) -> list[int]:
        """Of each participant in a round; pooled training takes as many as the peers do on
        average.
        """
        steps = self.prepared.local_steps
        return [round(sum(steps) / len(steps))] if self.arm.pooled else steps

    def _topology(self) -> Topology:
        """Who talks to whom: as configured, everybody (fedavg), or nobody."""
        if self.arm.talks == "as configured":
            return self.prepared.topology
        names = self.prepared.names
        if self.arm.talks == "with all":
            return build_topology(TopologySection(kind="complete"), None, names)
        alone = ("pooled",) if self.arm.pooled else names
        return Topology("alone", alone, (torch.eye(len(alone), dtype=torch.float64).numpy(),))

    def _rule(self) -> Rule:
        """The configured rule for Dec-LoRA; the baselines are plain LoRA."""
        return build_rule(
            self.prepared.config.peers if self.arm.talks == "as configured" else PeersSection()
        )

    def _restore(self, stored: Checkpoint) -> None:
        state, here = stored.state, environment(self.group_size)
        warn_of_another(state["environment"], here)
        self.participants.load(stored.factors, stored.optimizer)
        self.rounds_done = stored.rounds_done
        # 0.1.0 kept scores of nothing trained
        self.best = state["best"] if state["best"].get("rounds_done") else {}
        self.tokens_before = state.get("tokens")
        self.steps_done = self.rounds_done * sum(self.local_steps)
        self.transport.bytes_on_wire = state["bytes_on_wire"]
        if self.schedules is not None:
            self.schedules.load(state)
        self._cloud_bytes_before += state.get("cloud_bytes", 0)

    def _after_round(self) -> None:
        """Score and save when it is time; stop when asked to."""
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
        stopping = self.stop() and not last
        if last or stopping or self.rounds_done % config.save_every == 0:
            self._save()
        if stopping:
            raise Interrupted(
                f"{self.name} stopped after round {self.rounds_done} of {config.train.rounds},"
                " finished and saved"
            )

    def _save(self, due: Mapping[str, Any] | None = None) -> None:
        """A checkpoint; ``due``: what is to be done before the next round."""
        with self.spent.on("saving"):
            factors, optimizer = self.participants.factors, self.participants.optimizer_state()
            state = {
                "bytes_on_wire": self.transport.bytes_on_wire,
                **self._with_cloud,
                "seconds": self.seconds,
                "spent_s": dict(self.spent.seconds),
                "tokens": self.tokens,
                "best": self.best,
                "log_position": self.log.position,
                **(self.schedules.state() if self.schedules else {}),
                **(due or {}),
                "environment": environment(self.group_size),
            }
            self.folder.save(self.name, Checkpoint(self.rounds_done, factors, optimizer, state))

    def _score(self, peers: bool) -> tuple[Scored, dict[str, Scores]]:
        """Score the average, and each peer's own where asked; remember the best average of trained
        ones.
        """
        standing = self.participants.standing()
        try:
            consensus = self.scoring.average(average(standing), first=not self.rounds_done)
            own: dict[str, Scores] = {}
            # of one participant the average is its own
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
        if self.rounds_done and (not self.best or better(consensus.scores, self.best)):
            self.best = {"rounds_done": self.rounds_done, **consensus.scores}
        self.log.emit(
            "scores",
            run=self.name,
            rounds_done=self.rounds_done,
            consensus=consensus.scores,
            peers=own or None,
            peers_mean=mean_scores(own) if own else None,
            peers_mean_error=standard_errors(own, len(self.local_steps)),
            bytes_on_wire=self.transport.bytes_on_wire,
            **self._with_cloud,
            seconds=self.seconds,
        )
        return consensus, own

    def _write_adapters(self) -> None:
        model, factors = self.prepared.model, self.participants.standing()
        save_adapter(
            self.folder.path / "consensus", average(factors), model, self.prepared.tokenizer
        )
        for index, name in enumerate(self.prepared.names):
            save_adapter(self.folder.path / "peers" / name, one(factors, index), model)

    def _tick_step(self, num_participants: int) -> None:
        self.steps_done += num_participants
        total = sum(self.local_steps) * self.prepared.config.train.rounds
        self.log.tick("step", run=self.name, done=self.steps_done, total=total)
