"""The half that owns data, labels, factors and optimiser; its frozen model runs in a cloud."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from dlora.config import Config
from dlora.errors import ConfigError, IdentityError, Interrupted
from dlora.net.identity import Federation, FederationFile, Identity
from dlora.programs.account import Summary, introduction, summary
from dlora.programs.halves import far_cloud
from dlora.programs.one_run import Run
from dlora.programs.prepare import manifest_text, prepare
from dlora.programs.run_folder import RunFolder
from dlora.report import write_report
from dlora.runlog import Listener, RunLog, to_json, write_atomically
from dlora.split_frames import ChannelDown

RUN = "dlora"


def device(
    config: Config,
    *,
    name: str,
    key: str | Path,
    federation: str | Path,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Train ``name``'s factors on its own data through the cloud of ``config.split``; return what summary.json holds.

    A cloud that is away is waited for, one that comes back is gone on with. Raises UserError before anything is written when
    the run cannot start, CloudError when the cloud refuses this device.
    """
    listed = Federation.load(federation)
    identity = Identity.load(name, key, listed)
    check_halves(config, name, listed)
    if config.compare or config.peers.members:
        what = "compare needs everybody's data in one place" if config.compare else "peers.members: a device has no neighbours"
        raise ConfigError(f"{what}; remove it, or use dlora simulate")
    if not resume:
        RunFolder.check_new(config)
    prepared = prepare(config, lambda text: [listen({"event": "phase", "text": text}) for listen in listeners], own=name)
    assert prepared.half is not None and config.split is not None
    folder = RunFolder.resume(config, manifest_text(prepared.manifest)) if resume else RunFolder.create(config)
    stored = folder.latest(RUN)
    with RunLog(folder.log_path, listeners) as log:
        if resume:
            log.truncate((stored.result or stored.state)["log_position"] if stored else 0)
        if log.position == 0:
            write_atomically(folder.path / "manifest.json", manifest_text(prepared.manifest))
            log.emit("start", **introduction(prepared, [RUN], 1, name))
        log.tick("phase", text=f"waiting for the cloud {config.split.cloud}")

        def refused(reason: str) -> None:
            log.emit("connection-refused", reason=reason)

        with far_cloud(prepared.half, config, identity, FederationFile(federation), refused, stop) as cloud_bytes:
            if stored and stored.result and stored.rounds_done >= config.train.rounds:
                result = stored.result["result"]
            else:
                try:
                    result = Run(RUN, prepared, folder, log, 1, stop, cloud_bytes).result(stored)
                except ChannelDown:
                    raise Interrupted(f"{name} stopped while its cloud was away; what was saved stands") from None
        summed = summary(prepared, {RUN: result}, prepared.manifest, 1, result["seconds"], name)
        log.emit("done", seconds=result["seconds"])
        write_atomically(folder.path / "summary.json", to_json(summed, indent=1))
    write_report(folder.path)
    return summed


def check_halves(config: Config, name: str, listed: Federation) -> None:
    """Raise ConfigError or IdentityError unless ``name`` may be a device and ``config.split.cloud`` is a cloud to dial."""
    if config.split is None:
        raise ConfigError("split is missing; a device needs the name of its cloud, such as split: {cloud: hub}")
    if listed.member(name).role != "device":
        raise IdentityError(
            f"{name} is a {listed.member(name).role} in {listed.source}; a device is made with: dlora identity new {name}"
            " --role device"
        )
    cloud = listed.members.get(config.split.cloud)
    if cloud is None:
        near = difflib.get_close_matches(config.split.cloud, listed.members, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; it lists {', '.join(sorted(listed.members))}"
        raise ConfigError(f"split.cloud {config.split.cloud} is not in {listed.source}{hint}")
    if cloud.role != "cloud" or cloud.address is None:
        what = f"a {cloud.role}" if cloud.role != "cloud" else "a cloud without an address"
        raise ConfigError(f"split.cloud {cloud.name} is {what} in {listed.source}; name a cloud that can be dialled")
