"""The half that owns data, labels, factors and optimiser; its frozen model runs in a cloud."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from dlora.config import Config
from dlora.errors import CloudError, ConfigError, IdentityError
from dlora.net.identity import Federation, FederationFile, Identity
from dlora.programs.account import Summary, introduction, summary
from dlora.programs.halves import far_cloud
from dlora.programs.one_run import Run
from dlora.programs.prepare import Prepared, manifest_text, prepare
from dlora.programs.run_folder import RunFolder
from dlora.report import write_report
from dlora.runlog import Listener, RunLog, to_json, write_atomically
from dlora.split_frames import Opened

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
        waiting = f"waiting for the cloud {config.split.cloud}"

        def tell(event: str, reason: str) -> None:
            log.emit(event, reason=reason)
            log.tick("phase", text=waiting if event == "cloud-lost" else f"{waiting}: {reason}")

        with far_cloud(prepared.half, config, identity, FederationFile(federation), tell, stop) as cloud_bytes:
            if stored and stored.result and stored.rounds_done >= config.train.rounds:
                result = stored.result["result"]
            else:
                log.tick("phase", text=waiting)
                try:
                    check_room(prepared, prepared.half.open())
                except CloudError:
                    if not resume:
                        folder.remove()  # nothing has begun
                    raise
                result = Run(RUN, prepared, folder, log, 1, stop, cloud_bytes).result(stored)
        summed = summary(prepared, {RUN: result}, prepared.manifest, 1, result["seconds"], name)
        log.emit("done", seconds=result["seconds"])
        write_atomically(folder.path / "summary.json", to_json(summed, indent=1))
    write_report(folder.path)
    return summed


def check_room(prepared: Prepared, limits: Opened) -> None:
    """Raise CloudError when one of the texts alone is more than the cloud takes."""
    data = prepared.data
    options = [option for choice in data.choices for option in choice.options]
    longest = max(len(row.input_ids) for rows in (*data.peers.values(), data.evaluation, options) for row in rows)
    if longest > limits.max_tokens:
        raise CloudError(
            f"a text of {longest} tokens is more than the cloud takes, {limits.max_tokens}: lower data.max_length, or raise"
            " limits.max_tokens there"
        )


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
