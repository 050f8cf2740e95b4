"""One real peer, or a device with neighbours: its data, its disk, its neighbours, its cloud."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dlora.config.launchers import restarts
from dlora.config.run import Config
from dlora.data.first_look import members_of
from dlora.errors import ConfigError, NeighbourError
from dlora.events.log import Listener
from dlora.identity.federation import Federation, FederationFile
from dlora.identity.keys import Identity
from dlora.net.between_ranks import one_may_end
from dlora.net.listen_address import (
    check_listen,
    listen_address,
)
from dlora.run.account import Summary
from dlora.run.findings import Findings
from dlora.run.folder import RunFolder
from dlora.run.frozen_model import check_halves, far_cloud, reach_cloud
from dlora.run.opening import OpenRun, began_here, opened
from dlora.run.place import placed
from dlora.run.prepare import Prepared
from dlora.run.ranks import joined_ranks
from dlora.run.real_peer import PeerRun
from dlora.run.site import RUN, Site


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
    whole_process: bool = False,
) -> Summary:
    """Take part in the run of ``config.peers.members`` as ``name``; returns what summary.json
    holds.

    The frozen model runs here or, with ``config.split``, in this device's cloud. Each device may
    have its own cloud and its own wire dtype to it. ``listen`` (HOST:PORT) is where links are
    accepted; the default is all interfaces at the port of this member's address. ``whole_process``
    as for `simulate`. If torchrun started several processes, each calls this with the same
    arguments, and each returns the summary: they train this one peer together, and the first has
    the links. Raises UserError before anything is written if the run cannot start,
    NeighbourError if a neighbour is in another run, CloudError if the cloud refuses this device.
    Raises NeighbourError also after everything is written, if the average may be wrong.
    """
    processes = joined_ranks()
    if config.split is not None and processes.are_several:
        raise processes.told_once(
            ConfigError(
                f"split: {processes.size} processes would train a model whose body is in a cloud:"
                " start one"
            )
        )
    admitted: list[_Admitted] = []  # of the first process, which alone has links
    processes.on_main(lambda: admitted.append(_admitted(config, name, key, federation, listen)))
    again = processes.on_main(lambda: restarts(os.environ) > 0 and began_here(config))
    taken_part: list[tuple[Findings, int, Summary]] = []
    with (
        opened(
            config,
            [RUN],
            own=name,
            resume=resume or again,
            listeners=listeners,
            stop=stop,
            whole_process=whole_process,
            ranks=processes,
            check=lambda prepared: processes.on_main(lambda: admitted[0].check(prepared)),
        ) as run,
        one_may_end(),
    ):
        site = Site(run)
        if processes.is_main:
            with site.leading():
                taken_part.append(_took_part(run, site, admitted[0], FederationFile(federation)))
        else:
            site.follow()

    def tell() -> Summary:
        findings, num_peers, concluded = taken_part[0]
        _tell(findings, num_peers, concluded)
        return concluded

    return processes.on_main(tell)


class _Admitted(NamedTuple):
    """A member that may take part, and where it accepts links; None: it only dials."""

    identity: Identity
    listed: Federation
    address: str | None

    def check(self, prepared: Prepared) -> None:
        """Raise ConfigError if its neighbours or its address cannot be used."""
        self.listed.check_dialable(prepared.topology.named_pairs())
        if self.address is not None:
            check_listen(self.address)


def _admitted(
    config: Config, name: str, key: str | Path, federation: str | Path, listen: str | None
) -> _Admitted:
    members = members_of(config, name)
    listed = Federation.load(federation)
    identity = Identity.load(name, key, listed)
    if config.split is not None:
        check_halves(config, name, listed)
    _check_roles(config, members, listed)
    return _Admitted(identity, listed, listen_address(listen, listed.member(name).address))


def _took_part(
    run: OpenRun, site: Site, admitted: _Admitted, federation: FederationFile
) -> tuple[Findings, int, Summary]:
    """What was found about neighbours, how many peers are in the average, and the summary."""
    config, half, log = run.config, run.prepared.half, run.log
    identity = admitted.identity
    with placed(
        identity,
        federation,
        admitted.address,
        ledger=run.folder.path / "exchange",
        section=config.peers,
        topology=run.prepared.topology,
        messages=run.prepared.messages,
        manifest=run.manifest,
        log=log,
    ) as place:
        finished, position = _finished(run.folder), place.ledger.position
        live = PeerRun(run, site, place)
        cloud: contextlib.AbstractContextManager[Callable[[], int] | None] = (
            far_cloud(
                half, config, identity, federation, live.cloud.hear, live.gives_up, place.loop
            )
            if half is not None and live.cloud is not None
            else contextlib.nullcontext()
        )
        with cloud as live.tally.cloud_bytes:
            if half is not None and live.progress.rounds_done < config.train.rounds:
                # before the neighbours wait for a peer that cannot begin
                reach_cloud(log, run.prepared)
            run.watch.started()
            consensus, num_peers = live.live()
            if (
                finished
                and place.ledger.position == position
                and _said(finished) == (num_peers, live.findings.warnings(num_peers))
            ):
                # no edge was decided since and no new peer is in the average: nothing has changed
                return live.findings, num_peers, finished
            result = live.finish(consensus, num_peers)
    return live.findings, num_peers, run.conclude({RUN: result})


def _said(finished: Summary) -> tuple[int, list[str]]:
    """Of how many peers a summary's average is made, and its warnings."""
    told = finished["runs"][RUN]
    return told["consensus_peers"], told.get("warnings", [])


def _tell(findings: Findings, num_peers: int, concluded: Summary) -> None:
    """Warn of what was found. Raises NeighbourError where the average may be wrong, or where no
    peer has one; everything is written before.
    """
    for text in findings.warnings(num_peers):
        warnings.warn(text, stacklevel=2)
    edges = concluded["runs"][RUN].get("edges", {})
    if edges and num_peers == 1 and not any(edge["mixed"] for edge in edges.values()):
        raise NeighbourError(
            f"{findings.name} trained alone: no round was mixed with {', '.join(edges)}, and"
            " log.jsonl says why; everything is written; once they can be reached, start anew in"
            " another output_dir"
        )
    if blamed := findings.blamed(num_peers):
        raise NeighbourError(blamed)


def _finished(folder: RunFolder) -> Summary | None:
    """The summary of a run that has ended already, else None.

    A damaged summary counts as None, because it is written again.
    """
    try:
        written: Summary = json.loads((folder.path / "summary.json").read_text())
        return written if "consensus_peers" in written["runs"][RUN] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _check_roles(config: Config, members: Sequence[str], listed: Federation) -> None:
    """Raise ConfigError unless all members are peers, or all are devices (with split)."""
    role, why = ("peer", "without") if config.split is None else ("device", "with")
    for name in members:
        if listed.member(name).role != role:
            raise ConfigError(
                f"peers.members: {name} is a {listed.member(name).role} in {listed.source}; {why}"
                f" split all members are {role}s"
            )
