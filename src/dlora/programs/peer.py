"""One peer for real: its own data, its own disk, and the neighbours it can reach; nothing else exists."""

from __future__ import annotations

import asyncio
import difflib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dlora.config import Config
from dlora.decentralized.ledger import Ledger
from dlora.errors import ConfigError, NeighbourError
from dlora.net.grpc import GrpcNetwork
from dlora.net.identity import Federation, FederationFile, Identity
from dlora.programs.account import Summary, introduction, summary
from dlora.programs.listening import listen_address
from dlora.programs.peer_run import RUN, PeerRun
from dlora.programs.prepare import manifest_text, prepare
from dlora.programs.run_folder import RunFolder
from dlora.report import write_report
from dlora.runlog import Listener, RunLog, to_json, write_atomically


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
    prepared = prepare(
        config, lambda text: [listen_to({"event": "phase", "text": text}) for listen_to in listeners], own=name, resume=resume
    )
    topology = prepared.topology
    listed.check_dialable(
        {(members[one], members[two]) for round in range(topology.period) for one, two in topology.edges(round)}
    )
    manifest = prepared.manifest | {"rounds": config.train.rounds}
    listen = listen_address(listen, listed.member(name).address)
    folder = RunFolder.resume(config, manifest_text(manifest)) if resume else RunFolder.create(config)
    prepared.keep_frame()
    stored = folder.latest(RUN)
    with RunLog(folder.log_path, listeners) as log:
        if not resume or log.position == 0:
            write_atomically(folder.path / "manifest.json", manifest_text(manifest))
            log.emit("start", **introduction(prepared, [RUN], 1, name))
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
        summed = summary(prepared, {RUN: result}, manifest, 1, result["seconds"], name)
        log.emit("done", seconds=result["seconds"])
        write_atomically(folder.path / "summary.json", to_json(summed, indent=1))
    write_report(folder.path)
    return summed


def _finished(folder: RunFolder) -> Summary | None:
    """The summary of a run that has ended already."""
    path = folder.path / "summary.json"
    written: Summary | None = json.loads(path.read_text()) if path.exists() else None
    return written


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
    if config.split is not None:
        raise ConfigError(
            "split: a peer runs the frozen model itself; remove it, or be a device without neighbours: dlora device"
        )
    return members
