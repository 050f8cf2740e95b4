"""One peer for real: its own data, its own disk, and the neighbours it can reach; nothing else exists."""

from __future__ import annotations

import asyncio
import difflib
import errno
import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dlora
from dlora.config import Config
from dlora.decentralized.ledger import Ledger
from dlora.decentralized.topology import spectral_gap
from dlora.errors import ConfigError, NeighbourError
from dlora.evaluate import primary_metric
from dlora.lora.factors import num_parameters, stack
from dlora.net.grpc import GrpcNetwork
from dlora.net.identity import Federation, FederationFile, Identity
from dlora.programs.peer_run import RUN, PeerRun
from dlora.programs.prepare import Prepared, manifest_hash, manifest_text, prepare
from dlora.programs.run_folder import RunFolder
from dlora.report import write_report
from dlora.runlog import Listener, RunLog, to_json, write_atomically

Summary = dict[str, Any]


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
        finished, position = _finished(folder), ledger.position
        try:
            run = PeerRun(name, prepared, manifest, folder, log, ledger, network, stop, stored)
            consensus, num_peers = asyncio.run(run.live(neighbours))
        except NeighbourError:
            if not resume:  # nothing was trained: once the config is mended, the same command starts anew
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        finally:
            ledger.close()
        if finished and ledger.position == position and finished["runs"][RUN]["consensus_peers"] == num_peers:
            return finished  # no doubt was settled and nobody new is in the average: all is as it was
        result = run.finish(consensus, num_peers)
        summary = _summary(prepared, name, manifest, result)
        log.emit("done", seconds=result["seconds"])
        write_atomically(folder.path / "summary.json", to_json(summary, indent=1))
    write_report(folder.path)
    return summary


def _finished(folder: RunFolder) -> Summary | None:
    """The summary of a run that has ended already."""
    path = folder.path / "summary.json"
    summary: Summary | None = json.loads(path.read_text()) if path.exists() else None
    return summary


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
    """Raise ConfigError when nobody can listen there: later there would be a run folder to remove."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--listen {listen}: expected HOST:PORT, such as 0.0.0.0:7000 or [::]:7000")
    try:
        places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(f"--listen {listen}: {host} is no address of this machine ({error.strerror})") from error
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: a closed link is in nobody's way
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                continue  # a machine without IPv6; gRPC then takes the IPv4 wildcard
            what = "another program does" if error.errno == errno.EADDRINUSE else error.strerror
            raise ConfigError(
                f"cannot listen on {listen}: {what}; stop that program or --listen on another HOST:PORT"
            ) from None


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
