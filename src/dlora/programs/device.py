"""One device: it has the data, labels, factors and optimiser, and its model runs in a cloud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dlora.config.arms import DLORA
from dlora.config.run import Config
from dlora.data.first_look import refuse_comparison
from dlora.errors import ConfigError
from dlora.events.log import Listener
from dlora.identity.federation import Federation, FederationFile
from dlora.identity.keys import Identity
from dlora.programs.peer import peer
from dlora.run.account import Summary
from dlora.run.frozen_model import check_halves, far_cloud, reach_cloud, teller
from dlora.run.opening import opened
from dlora.run.simulated import Run

RUN = DLORA.name


def device(
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
    """Train ``name``'s factors on its own data through the cloud of ``config.split``.

    Returns what summary.json holds. The device waits while the cloud is away and goes on when it is
    back. With ``config.peers.members`` this is `peer`, and only then ``listen`` has a use.
    ``whole_process`` as for `simulate`. Raises UserError before anything is written if the run
    cannot start, CloudError if the cloud refuses this device.
    """
    listed = Federation.load(federation)
    identity = Identity.load(name, key, listed)
    check_halves(config, name, listed)
    if config.peers.members:
        return peer(
            config,
            name=name,
            key=key,
            federation=federation,
            listen=listen,
            resume=resume,
            listeners=listeners,
            stop=stop,
            whole_process=whole_process,
        )
    if listen is not None:
        raise ConfigError(
            "--listen is for neighbours to dial: name them in peers.members, or remove it"
        )
    refuse_comparison(config)
    with opened(
        config,
        [RUN],
        own=name,
        resume=resume,
        listeners=listeners,
        stop=stop,
        whole_process=whole_process,
    ) as run:
        half, split = run.prepared.half, config.split
        assert half is not None and split is not None  # `check_halves` has checked this
        tell = teller(run.log, split.cloud)
        members = FederationFile(federation)
        with far_cloud(half, config, identity, members, tell, stop) as cloud_bytes:
            finished = run.finished(RUN)
            if finished is None:
                reach_cloud(run.log, run.prepared)
            run.begin()
            result = finished or Run(RUN, run, cloud_bytes).result()
        return run.conclude({RUN: result})
