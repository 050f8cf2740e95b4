"""The half that owns data, labels, factors and optimiser; its model runs in a cloud. With
neighbours, a peer too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dlora.config.arms import DLORA
from dlora.config.run import Config
from dlora.data.first_look import refuse_comparison
from dlora.errors import CloudError, ConfigError
from dlora.events.log import Listener, RunLog, loaded, loading
from dlora.files import write_atomically
from dlora.identity.federation import Federation, FederationFile
from dlora.identity.keys import Identity
from dlora.programs.peer import peer
from dlora.run.account import Summary, conclude, introduction, summary
from dlora.run.folder import RunFolder
from dlora.run.frozen_model import check_halves, check_room, far_cloud, teller
from dlora.run.lock import sole_use
from dlora.run.manifest import manifest_text
from dlora.run.prepare import Prepared, prepare
from dlora.run.simulated import Run
from dlora.run.spent import Stopwatch, spent_before

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
    """Train ``name``'s factors on its own data through the cloud of ``config.split``; return what
    summary.json holds.

    A cloud that is away is waited for, one that comes back is gone on with. With
    ``config.peers.members`` this is `peer`, which alone has a use for ``listen``. ``whole_process``
    as for `simulate`. Raises UserError before anything is written when the run cannot start,
    CloudError when the cloud refuses this device.
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
    watch = Stopwatch(whole_process)
    if resume:
        RunFolder.check_same(config, name)
    else:
        RunFolder.check_new(config)
    prepared = prepare(config, loading(listeners), own=name, resume=resume)
    loaded(listeners)
    with sole_use(Path(config.output_dir)):
        return _trained(
            prepared, identity, FederationFile(federation), resume, listeners, stop, watch
        )


def _trained(
    prepared: Prepared,
    identity: Identity,
    federation: FederationFile,
    resume: bool,
    listeners: Sequence[Listener],
    stop: Callable[[], bool],
    watch: Stopwatch,
) -> Summary:
    config, name = prepared.config, identity.name
    assert prepared.half is not None and config.split is not None
    folder = (
        RunFolder.resume(config, manifest_text(prepared.manifest))
        if resume
        else RunFolder.create(config)
    )
    prepared.keep_frame()
    stored = folder.latest(RUN)
    with RunLog(folder.log_path, listeners) as log:
        if resume:
            log.truncate((stored.result or stored.state)["log_position"] if stored else 0)
        if log.position == 0:
            write_atomically(folder.path / "manifest.json", manifest_text(prepared.manifest))
            log.emit("start", **introduction(prepared, [RUN], 1, name))
        tell = teller(log, config.split.cloud)
        with far_cloud(prepared.half, config, identity, federation, tell, stop) as cloud_bytes:
            if stored and stored.result and stored.rounds_done >= config.train.rounds:
                result = stored.result["result"]
            else:
                log.tick("phase", text=f"waiting for the cloud {config.split.cloud}")
                try:
                    check_room(prepared, prepared.half.open())
                except CloudError:
                    if not resume:
                        folder.remove()  # nothing has begun
                    raise
                watch.started()
                spent = watch.run(spent_before(stored))
                result = Run(RUN, prepared, folder, log, 1, stop, cloud_bytes, spent).result(stored)
        summed = summary(prepared, {RUN: result}, prepared.manifest, 1, result["seconds"], name)
        log.emit("done", seconds=result["seconds"])
    return conclude(folder, summed, watch)
