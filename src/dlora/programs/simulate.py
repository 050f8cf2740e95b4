"""n peers in one process, and the baselines that tell what their agreement is worth."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dlora
from dlora.config import Config, PeersSection, TopologySection
from dlora.data import Batch, collate
from dlora.decentralized.gossip import Gossip
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.topology import Topology, build_topology, spectral_gap
from dlora.errors import Interrupted
from dlora.evaluate import Scores, better, evaluate, mean_scores, primary_metric
from dlora.lora.adapter_io import save_adapter
from dlora.lora.factors import average, consensus_distance, num_parameters, one, stack
from dlora.net.memory import MemoryTransport
from dlora.programs.prepare import WIRE_DTYPES, Prepared, fitting_group_size, manifest_hash, manifest_text, prepare
from dlora.programs.run_folder import Checkpoint, RunFolder, environment
from dlora.report import write_report
from dlora.runlog import Listener, RunLog, to_json, write_atomically
from dlora.seeds import derive_seed
from dlora.train import Group, Participants, learning_rate, local_steps

Summary = dict[str, Any]


def simulate(
    config: Config,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Run Dec-LoRA and the baselines of ``config.compare``; return what summary.json holds.

    ``stop`` is asked after every round; once it says yes the round is saved and Interrupted raised.
    Raises UserError before anything is written when the run cannot start.
    """
    if not resume:
        RunFolder.check_new(config)
    prepared = prepare(config, lambda text: [listen({"event": "phase", "text": text}) for listen in listeners])
    folder = RunFolder.resume(config) if resume else RunFolder.create(config)
    runs = ("dec-lora", *config.compare)
    stored = {run: folder.latest(run) for run in runs}
    group_size = next((c.state["environment"]["group_size"] for c in stored.values() if c), 0) or fitting_group_size(prepared)
    with RunLog(folder.log_path, listeners) as log:
        if resume:
            log.truncate(max((c.result or c.state)["log_position"] if c else 0 for c in stored.values()))
        if log.position == 0:
            write_atomically(folder.path / "manifest.json", manifest_text(prepared.manifest))
            log.emit("start", **_introduction(prepared, runs, group_size))
        started = time.monotonic()
        results = {run: _Run(prepared, folder, log, run, group_size, stored[run], stop).result() for run in runs}
        summary = _summary(prepared, results, group_size, sum(result["seconds"] for result in results.values()))
        log.emit("done", seconds=time.monotonic() - started)
        write_atomically(folder.path / "summary.json", to_json(summary, indent=1))
    write_report(folder.path)
    return summary


def dry_run(config: Config) -> Summary:
    """Check everything a run needs and say what it would be; nothing is written."""
    RunFolder.check_new(config)
    prepared = prepare(config)
    return _introduction(prepared, ("dec-lora", *config.compare), fitting_group_size(prepared)) | {
        "local_steps": prepared.local_steps,
        "manifest": manifest_hash(prepared.manifest),
    }


@dataclass
class _Run:
    """One of the runs: who takes part, over which topology, and its state between two commits."""

    prepared: Prepared
    folder: RunFolder
    log: RunLog
    name: str
    group_size: int
    stored: Checkpoint | None
    stop: Callable[[], bool]
    rounds_done: int = 0
    seconds: float = 0.0  # of training and exchange, without scoring
    best: dict[str, Any] = field(default_factory=dict)

    def result(self) -> Summary:
        """Run what is left of the rounds, save, and score."""
        config = self.prepared.config
        if self.stored and self.stored.result and self.stored.rounds_done >= config.train.rounds:
            result: Summary = self.stored.result["result"]
            return result
        self.pooled = self.name == "pooled"
        self.local_steps = self._local_steps()
        self.groups = _groups(self.local_steps, self.group_size)
        self.participants = Participants(self.prepared.model.initial, self.groups, config.train, self.prepared.model.device)
        self.transport = MemoryTransport(WIRE_DTYPES[config.peers.wire])
        self._restore()
        trained = {name: self.participants.factors[name] for name in self.prepared.trained}
        gossip = Gossip(trained, self._topology(), self._rule(), self.transport, self.transport.wire)
        self.log.emit("run", run=self.name, rounds=config.train.rounds, local_steps=self.local_steps, participants=len(self.local_steps))
        if self.rounds_done == 0:
            self._score(peers=False)
        while self.rounds_done < config.train.rounds:
            began = time.monotonic()
            losses = gossip.round(self.rounds_done, self._train)
            self.seconds += time.monotonic() - began
            self.log.emit(
                "round",
                run=self.name,
                round=self.rounds_done,
                loss=losses.mean().item(),
                losses=losses.tolist(),
                learning_rate=self._learning_rates(self.rounds_done, self.local_steps[0])[-1],
                consensus_distance=consensus_distance(trained),
                bytes_on_wire=self.transport.bytes_on_wire,
                seconds=self.seconds,
            )
            self.rounds_done += 1
            self._after_round()
        consensus, peers = self._score(peers=True)
        if self.name == "dec-lora":
            self._write_adapters()
        result = {
            "consensus": consensus,
            "peers_mean": mean_scores(peers) if peers else None,
            "peers": peers,
            "best": self.best,
            "bytes_on_wire": self.transport.bytes_on_wire,
            "consensus_distance": consensus_distance(trained),
            "seconds": self.seconds,
            "participant_steps_per_second": config.train.rounds * sum(self.local_steps) / self.seconds,
            "local_steps": self.local_steps,
        }
        self.log.emit("run-done", run=self.name, **{key: result[key] for key in ("consensus", "peers_mean", "bytes_on_wire", "seconds")})
        self.folder.finish(self.name, self.rounds_done, {"result": result, "log_position": self.log.position})
        return result

    def _local_steps(self) -> list[int]:
        """Of each participant in a round; pooled training takes as many as the peers do on average."""
        steps = self.prepared.local_steps
        return [round(sum(steps) / len(steps))] if self.pooled else steps

    def _topology(self) -> Topology:
        """Who talks to whom: as configured, everybody (fedavg), or nobody."""
        if self.name == "dec-lora":
            return self.prepared.topology
        names = self.prepared.names
        if self.name == "fedavg":
            return build_topology(TopologySection(kind="complete"), None, names)
        alone = ("pooled",) if self.pooled else names
        return Topology("alone", alone, (torch.eye(len(alone), dtype=torch.float64).numpy(),))

    def _rule(self) -> Any:
        """The configured rule for Dec-LoRA; the baselines are plain LoRA."""
        return build_rule(self.prepared.config.peers if self.name == "dec-lora" else PeersSection())

    def _restore(self) -> None:
        if self.stored is None:
            return
        state, here = self.stored.state, environment(self.group_size)
        if state["environment"] != here:
            warnings.warn(
                f"this run was saved with {state['environment']} and goes on with {here}: right, but not bit for bit", stacklevel=2
            )
        self.participants.load(self.stored.factors, self.stored.optimizer)
        self.rounds_done, self.seconds, self.best = self.stored.rounds_done, state["seconds"], state["best"]
        self.transport.bytes_on_wire = state["bytes_on_wire"]
        self.log.emit("resumed", run=self.name, rounds_done=self.rounds_done)

    def _train(self, names: frozenset[str]) -> Tensor:
        """The local steps of one round, group after group; returns each participant's mean loss (P,)."""
        losses = []
        for group in self.participants.groups:
            group.train_only(names)
            if self.prepared.config.train.optimizer_state == "reset":
                group.optimizer.state.clear()
            steps = self.local_steps[group.first]
            with torch.random.fork_rng():  # dropout follows from the position in the run, so a checkpoint need not hold it
                torch.manual_seed(derive_seed(self.prepared.config.seed, "dropout", self.rounds_done, group.first))
                history = local_steps(
                    self.prepared.model,
                    group,
                    self._batches(group, self.rounds_done * steps, steps),
                    self._learning_rates(self.rounds_done, steps),
                    self.prepared.config.train,
                    self.prepared.autocast_dtype,
                    lambda: self._tick_step(group.last - group.first),
                )
            losses.append(history.mean(dim=0))
        return torch.cat(losses)

    def _batches(self, group: Group, start: int, steps: int) -> Iterator[list[Batch]]:
        """Each step's micro-batches. The pooled participant takes all peers' rows, in portions that fit."""
        section = self.prepared.config.train
        rows = section.per_device_train_batch_size
        names, data, streams = self.prepared.names, self.prepared.data.peers, self.prepared.streams
        portions = _groups([0] * len(names), self.group_size) if self.pooled else [range(group.first, group.last)]
        for micro_step in range(start * section.gradient_accumulation_steps, (start + steps) * section.gradient_accumulation_steps):
            if micro_step % section.gradient_accumulation_steps == 0:
                micro_batches: list[Batch] = []
            for portion in portions:
                chosen = [data[names[peer]][row] for peer in portion for row in streams[peer].take(micro_step * rows, rows)]
                micro_batches.append(collate(chosen, self.prepared.pad_token_id))
            if (micro_step + 1) % section.gradient_accumulation_steps == 0:
                yield micro_batches

    def _learning_rates(self, round: int, steps: int) -> list[float]:
        section = self.prepared.config.train
        return [learning_rate(section, step, section.rounds * steps) for step in range(round * steps, (round + 1) * steps)]

    def _after_round(self) -> None:
        """Score and save when it is time; stop when asked to."""
        config, last = self.prepared.config, self.rounds_done == self.prepared.config.train.rounds
        peers = bool(config.eval_peers_every) and self.rounds_done % config.eval_peers_every == 0
        if not last and (peers or (config.eval_every and self.rounds_done % config.eval_every == 0)):
            self._score(peers=peers)
        stopping = self.stop() and not last
        if last or stopping or self.rounds_done % config.save_every == 0:
            self.folder.save(
                self.name,
                Checkpoint(
                    self.rounds_done,
                    self.participants.factors,
                    self.participants.optimizer_state(),
                    {
                        "bytes_on_wire": self.transport.bytes_on_wire,
                        "seconds": self.seconds,
                        "best": self.best,
                        "log_position": self.log.position,
                        "environment": environment(self.group_size),
                    },
                ),
            )
        if stopping:
            raise Interrupted(f"{self.name} stopped after round {self.rounds_done} of {config.train.rounds}, finished and saved")

    def _score(self, peers: bool) -> tuple[Scores, dict[str, Scores]]:
        """Score the average, and each peer's own where asked; remember the best average."""
        consensus = self._evaluate(average(self.participants.factors), "average")
        own: dict[str, Scores] = {}
        if peers and not self.pooled:
            own = {name: self._evaluate(one(self.participants.factors, i), name) for i, name in enumerate(self.prepared.names)}
        if not self.best or better(consensus, self.best):
            self.best = {"rounds_done": self.rounds_done, **consensus}
        self.log.emit(
            "scores",
            run=self.name,
            rounds_done=self.rounds_done,
            consensus=consensus,
            peers=own or None,
            peers_mean=mean_scores(own) if own else None,
            bytes_on_wire=self.transport.bytes_on_wire,
            seconds=self.seconds,
        )
        return consensus, own

    def _evaluate(self, factors: dict[str, Tensor], what: str) -> Scores:
        prepared = self.prepared
        return evaluate(
            prepared.model,
            factors,
            prepared.data.evaluation,
            prepared.data.choices,
            pad_token_id=prepared.pad_token_id,
            batch_size=prepared.config.per_device_eval_batch_size,
            autocast_dtype=prepared.autocast_dtype,
            on_batch=lambda done, total: self.log.tick("evaluating", run=self.name, what=what, done=done, total=total),
        )

    def _write_adapters(self) -> None:
        save_adapter(self.folder.path / "consensus", average(self.participants.factors), self.prepared.model.peft_config)
        for index, name in enumerate(self.prepared.names):
            save_adapter(self.folder.path / "peers" / name, one(self.participants.factors, index), self.prepared.model.peft_config)

    def _tick_step(self, participants: int) -> None:
        total = sum(self.local_steps) * self.prepared.config.train.rounds
        self._steps_done = getattr(self, "_steps_done", self.rounds_done * sum(self.local_steps)) + participants
        self.log.tick("step", run=self.name, done=self._steps_done, total=total)


def _groups(local_steps: Sequence[int], group_size: int) -> list[range]:
    """Neighbouring participants with equally many local steps go together, at most ``group_size`` of them."""
    groups, first = [], 0
    for _, alike in itertools.groupby(local_steps):
        last = first + len(list(alike))
        groups += [range(start, min(start + group_size, last)) for start in range(first, last, group_size)]
        first = last
    return groups


def _introduction(prepared: Prepared, runs: Sequence[str], group_size: int) -> dict[str, Any]:
    """The log's first event: what is about to run."""
    data, topology = prepared.data, prepared.topology
    labels = data.label_counts or dict.fromkeys(prepared.names)
    return {
        "version": dlora.__version__,
        "model": prepared.config.model,
        "task": prepared.config.task,
        "metric": "accuracy" if prepared.config.task == "classification" or data.choices else "loss",
        "runs": list(runs),
        "peers": [{"name": name, "rows": len(data.peers[name]), "labels": labels[name]} for name in prepared.names],
        "edges": [topology.edges(round) for round in range(topology.period)],
        "spectral_gap": spectral_gap(topology),
        "trainable_parameters": num_parameters(stack(prepared.trained, 1)),
        "message_bytes": prepared.message_bytes,
        "group_size": group_size,
    }


def _summary(prepared: Prepared, results: dict[str, Summary], group_size: int, seconds: float) -> Summary:
    introduction = _introduction(prepared, list(results), group_size)
    return {
        "version": dlora.__version__,
        "model": prepared.config.model,
        "manifest": manifest_hash(prepared.manifest),
        "task": prepared.config.task,
        "metric": primary_metric(results["dec-lora"]["consensus"]),
        "seconds": seconds,
        **{key: introduction[key] for key in ("trainable_parameters", "message_bytes", "group_size", "spectral_gap")},
        "peers": {peer["name"]: {"rows": peer["rows"], "labels": peer["labels"]} for peer in introduction["peers"]},
        "runs": results,
    }
