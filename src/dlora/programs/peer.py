"""One peer for real: its own data, its own disk, and the neighbours it can reach; nothing else exists."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import errno
import math
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import dlora
from dlora.config import Config
from dlora.decentralized.exchange import Exchange, Patience
from dlora.decentralized.gossip import PeerGossip, Progress
from dlora.decentralized.ledger import Ledger
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.topology import Topology, spectral_gap
from dlora.errors import ConfigError, Interrupted, NeighbourError, RunError
from dlora.evaluate import Scores, better, primary_metric
from dlora.lora.adapter_io import save_adapter
from dlora.lora.factors import Factors, num_parameters, stack
from dlora.net.codec import message_num_bytes
from dlora.net.grpc import GrpcNetwork
from dlora.net.identity import Federation, FederationFile, Identity
from dlora.programs.messages import decode_message, encode_message, expected_tensors
from dlora.programs.prepare import Prepared, manifest_hash, manifest_text, prepare
from dlora.programs.run_folder import Checkpoint, RunFolder, environment
from dlora.programs.training import Training
from dlora.report import write_report
from dlora.runlog import Listener, RunLog, read_log, to_json, write_atomically

Summary = dict[str, Any]
RUN = "dec-lora"


def peer(
    config: Config,
    *,
    name: str,
    key: str | Path,
    federation: str | Path,
    listen: str | None = None,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Take part in the run of ``config.peers.members`` as ``name``; return what summary.json holds.

    ``listen`` (HOST:PORT) is where to accept links, by default on all interfaces at the port of this member's address.
    Raises UserError before anything is written when the run cannot start, NeighbourError when a neighbour is in another run.
    """
    members = _members(config, name)
    listed = Federation.load(federation)
    identity = Identity.load(name, key, listed)
    if not resume:
        RunFolder.check_new(config)
    prepared = prepare(config, lambda text: [listen_to({"event": "phase", "text": text}) for listen_to in listeners], own=name)
    topology = prepared.topology
    listed.check_dialable(
        {(members[one], members[two]) for round in range(topology.period) for one, two in topology.edges(round)}
    )
    manifest = prepared.manifest | {"rounds": config.train.rounds}
    if listen is None and (address := listed.member(name).address) is not None:
        listen = f"[::]:{address.rpartition(':')[2]}"
    if listen is not None:
        _check_listen(listen)
    folder = RunFolder.resume(config, manifest_text(manifest)) if resume else RunFolder.create(config)
    stored = folder.latest(RUN)
    with RunLog(folder.log_path, listeners) as log:
        if not resume or log.position == 0:
            write_atomically(folder.path / "manifest.json", manifest_text(manifest))
            log.emit("start", **_introduction(prepared, name))
        ledger = Ledger(folder.path / "exchange")
        neighbours = [members[other] for other in topology.all_neighbours(members.index(name))]
        network = GrpcNetwork(
            identity,
            FederationFile(federation),
            neighbours,
            listen,
            lambda reason: log.emit("connection-refused", reason=reason),
        )
        try:
            run = _PeerRun(name, prepared, manifest, folder, log, ledger, network, stop, stored)
            result = asyncio.run(run.live(neighbours))
        except NeighbourError:
            if not resume:  # nothing was trained: once the config is mended, the same command starts anew
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        finally:
            ledger.close()
        summary = _summary(prepared, name, manifest, result)
        log.emit("done", seconds=result["seconds"])
        write_atomically(folder.path / "summary.json", to_json(summary, indent=1))
    write_report(folder.path)
    return summary


class _PeerRun:
    """What the protocol is handed: training, messages, commits; and the scores at the end."""

    def __init__(
        self,
        name: str,
        prepared: Prepared,
        manifest: dict[str, Any],
        folder: RunFolder,
        log: RunLog,
        ledger: Ledger,
        network: GrpcNetwork,
        stop: Callable[[], bool],
        stored: Checkpoint | None,
    ) -> None:
        self.name, self.prepared, self.manifest = name, prepared, manifest
        self.folder, self.log, self.ledger, self.network, self.stop = folder, log, ledger, network, stop
        self.steps_done = 0
        self.training = Training(prepared, prepared.local_steps, 1, False, self._tick_step)
        self.progress = Progress()
        self.round: dict[str, Any] = {}  # the last round's event
        self.trained_round: int | None = None  # since the last commit
        self.abandoned = False
        self.best: dict[str, Any] = {}
        self.seconds = 0.0  # of training and exchange, waiting included
        self.bytes_before = 0  # on the wire, in earlier processes of this run
        if stored is not None:
            self.training.participants.load(stored.factors, stored.optimizer)
            self.progress = Progress(**stored.state["progress"])
            self.best, self.seconds = stored.state["best"], stored.state["seconds"]
            self.bytes_before = stored.state["bytes_on_wire"]
            self.round = stored.state["round"]
            self.steps_done = self.progress.rounds_done * self.training.local_steps[0]
        self.began_at = time.monotonic() - self.seconds
        self.loss = math.nan

    async def live(self, neighbours: list[str]) -> dict[str, Any]:
        """The run, while the network serves; returns the result that the summary shows."""
        config = self.prepared.config
        self.log.emit("run", run=RUN, rounds=config.train.rounds, local_steps=self.training.local_steps, participants=1)
        if self.progress.rounds_done:
            logged = {event.get("round") for event in read_log(self.folder.log_path) if event["event"] == "round"}
            if self.round and self.round["round"] not in logged:
                self.log.emit("round", **self.round)  # the kill came between the commit and its line
            self.log.emit("resumed", run=RUN, rounds_done=self.progress.rounds_done)
        exchange = Exchange(
            self.name,
            manifest_text(self.manifest),
            manifest_hash(self.manifest),
            self.ledger,
            neighbours,
            Patience(config.peers.silence_s, config.peers.round_limit_s),
            lambda message: message_num_bytes(expected_tensors(self.prepared, message)),
            partial(decode_message, self.prepared),
            self.log.emit,
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
            partial(encode_message, self.prepared),
            partial(decode_message, self.prepared),
            self._commit,
            self._restart_optimizer,
            self.progress,
        )
        serving = asyncio.create_task(self.network.serve(exchange.talk))
        life = asyncio.create_task(gossip.run())
        try:
            await asyncio.wait({serving, life}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done() and not life.done():
                serving.result()  # raises: it ends only with an error
            consensus, num_peers = life.result()
        finally:
            self.abandoned = True  # a second Ctrl-C need not wait for the local steps to end
            for task in (life, serving):
                task.cancel()
            await asyncio.gather(life, serving, return_exceptions=True)
        return self._finish(self.training.participants.factors | consensus, num_peers)

    async def _train(self, number: int, names: frozenset[str]) -> None:
        every = self.prepared.config.eval_peers_every or self.prepared.config.eval_every
        if number and every and number % every == 0:  # its own score: nobody has the average before the end
            own = await asyncio.to_thread(self._evaluate, self.training.participants.factors, self.name)
            self._emit_scores(None, own)
        losses = await asyncio.to_thread(self.training.round, number, names)
        self.loss, self.trained_round = losses.item(), number
        if not math.isfinite(self.loss):
            raise RunError(
                f"the loss of {self.name} is no number any more in round {number}; lower train.learning_rate and start anew"
                " in another output_dir"
            )

    def _commit(self, progress: Progress) -> None:
        """Factors, optimiser and progress to disk; then the round is done."""
        self.seconds = time.monotonic() - self.began_at
        last, trained = self.prepared.config.train.rounds, self.trained_round
        if trained is not None:
            self.round = self._round_event(trained)
        self.folder.save(
            RUN,
            Checkpoint(
                progress.rounds_done,
                self.training.participants.factors,
                self.training.participants.optimizer_state(),
                {
                    "progress": vars(progress),
                    "bytes_on_wire": self._bytes_on_wire(),
                    "seconds": self.seconds,
                    "best": self.best,
                    "round": self.round,
                    "environment": environment(1),
                },
            ),
        )
        self.progress = Progress(**vars(progress))
        if trained is None:
            return  # no round: the peer caught up, or doubts were settled after the last
        self.trained_round = None
        self.log.emit("round", **self.round)
        if self.stop() and progress.rounds_done < last:
            raise Interrupted(f"{self.name} stopped after round {progress.rounds_done} of {last}, finished and saved")

    def _round_event(self, number: int) -> dict[str, Any]:
        """What the log says of a round; the commit holds it too, for a kill may come between the two."""
        return {
            "run": RUN,
            "round": number,
            "loss": self.loss,
            "losses": [self.loss],
            "learning_rate": self.training.learning_rates(number, self.training.local_steps[0])[-1],
            "consensus_distance": None,
            "bytes_on_wire": self._bytes_on_wire(),
            "seconds": self.seconds,
        }

    def _restart_optimizer(self) -> None:
        for group in self.training.participants.groups:
            group.optimizer.state.clear()

    # The end

    def _finish(self, consensus: Factors, num_peers: int) -> dict[str, Any]:
        own = self._evaluate(self.training.participants.factors, self.name)
        average = self._evaluate(consensus, "average")
        if not self.best or better(average, self.best):
            self.best = {"rounds_done": self.progress.rounds_done, **average}
        self._emit_scores(average, own)
        save_adapter(self.folder.path / "consensus", consensus, self.prepared.model.peft_config)
        save_adapter(
            self.folder.path / "peers" / self.name, self.training.participants.factors, self.prepared.model.peft_config
        )
        result = {
            "consensus": average,
            "peers_mean": own,
            "peers": {self.name: own},
            "best": self.best,
            "consensus_peers": num_peers,
            "bytes_on_wire": self._bytes_on_wire(),
            "consensus_distance": None,
            "seconds": self.seconds,
            "local_steps": self.training.local_steps,
            "edges": _edge_counts(self.name, self.prepared.topology, self.ledger, self.prepared.config.train.rounds),
        }
        shown = {key: result[key] for key in ("consensus", "peers_mean", "bytes_on_wire", "seconds")}
        self.log.emit("run-done", run=RUN, **shown)
        return result

    def _evaluate(self, factors: Mapping[str, Tensor], what: str) -> Scores:
        return self.prepared.evaluate(
            factors, lambda done, total: self.log.tick("evaluating", run=RUN, what=what, done=done, total=total)
        )

    def _emit_scores(self, consensus: Scores | None, own: Scores) -> None:
        self.log.emit(
            "scores",
            run=RUN,
            rounds_done=self.progress.rounds_done,
            consensus=consensus,
            peers={self.name: own},
            peers_mean=own,
            bytes_on_wire=self._bytes_on_wire(),
            seconds=self.seconds,
        )

    def _bytes_on_wire(self) -> int:
        """Serialised frames this peer sent and received, in all processes of the run."""
        traffic = self.network.traffic
        return self.bytes_before + sum(traffic.sent_bytes.values()) + sum(traffic.received_bytes.values())

    def _tick_step(self, num_participants: int) -> None:
        if self.abandoned:
            raise Interrupted("given up")
        self.steps_done += num_participants
        total = self.training.local_steps[0] * self.prepared.config.train.rounds
        self.log.tick("step", run=RUN, done=self.steps_done, total=total)


def _members(config: Config, name: str) -> tuple[str, ...]:
    members = config.peers.members
    if members is None:
        raise ConfigError("peers.members is missing; a real peer needs the names of all, such as members: [north, south, west]")
    if name not in members:
        near = difflib.get_close_matches(name, members, n=1)
        raise ConfigError(
            f"--name {name} is not in peers.members ({', '.join(members)})" + (f"; did you mean {near[0]}?" if near else "")
        )
    if config.compare:
        raise ConfigError("compare needs everybody's data in one place; remove it, or use dlora simulate")
    return members


def _check_listen(listen: str) -> None:
    """Raise ConfigError when another program listens there: later there would be a run folder to remove."""
    host, _, port = listen.rpartition(":")
    with contextlib.suppress(socket.gaierror):  # what is no address gRPC refuses in its own words
        for family, kind, protocol, _, address in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: a closed link is in nobody's way
                    probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise ConfigError(
                        f"cannot listen on {listen}: another program does; stop that program or --listen on another HOST:PORT"
                    ) from None


def _edge_counts(name: str, topology: Topology, ledger: Ledger, rounds: int) -> dict[str, dict[str, int]]:
    """For each neighbour, how many of the run's rounds with it were mixed, left out, or are still in doubt."""
    index, committed = topology.names.index(name), ledger.committed()
    counts = {}
    for other in topology.all_neighbours(index):
        neighbour = topology.names[other]
        due = [round for round in range(rounds) if other in topology.neighbours(index, round)]
        mixed = sum((round, neighbour) in committed for round in due)
        doubts = len(ledger.in_doubt(neighbour))
        counts[neighbour] = {"mixed": mixed, "left_out": len(due) - mixed - doubts, "in_doubt": doubts}
    return counts


def _introduction(prepared: Prepared, name: str) -> dict[str, Any]:
    """The log's first event: what is about to run."""
    data, topology = prepared.data, prepared.topology
    labels = data.label_counts[name] if data.label_counts else None
    return {
        "version": dlora.__version__,
        "model": prepared.config.model,
        "task": prepared.config.task,
        "metric": "accuracy" if prepared.config.task == "classification" or data.choices else "loss",
        "runs": [RUN],
        "own": name,
        "peers": [
            {
                "name": member,
                "rows": len(data.peers[name]) if member == name else None,
                "labels": labels if member == name else None,
            }
            for member in topology.names
        ],
        "edges": [topology.edges(round) for round in range(topology.period)],
        "spectral_gap": spectral_gap(topology),
        "trainable_parameters": num_parameters(stack(prepared.trained, 1)),
        "message_bytes": prepared.message_bytes,
        "group_size": 1,
    }


def _summary(prepared: Prepared, name: str, manifest: dict[str, Any], result: dict[str, Any]) -> Summary:
    introduction = _introduction(prepared, name)
    return {
        "version": dlora.__version__,
        "model": prepared.config.model,
        "manifest": manifest_hash(manifest),
        "task": prepared.config.task,
        "metric": primary_metric(result["consensus"]),
        "own": name,
        "seconds": result["seconds"],
        **{key: introduction[key] for key in ("trainable_parameters", "message_bytes", "group_size", "spectral_gap")},
        "peers": {peer["name"]: {"rows": peer["rows"], "labels": peer["labels"]} for peer in introduction["peers"]},
        "runs": {RUN: result},
    }
