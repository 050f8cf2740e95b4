"""n peers in one process, and the baselines that tell what their agreement is worth."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dlora.config.arms import DEC_LORA
from dlora.config.launchers import refuse_ranks
from dlora.config.run import Config
from dlora.events.log import Listener, RunLog, loaded, loading
from dlora.files import write_atomically
from dlora.run.account import Summary, conclude, introduction, summary
from dlora.run.folder import RunFolder
from dlora.run.frozen_model import own_cloud
from dlora.run.grouping import find_grouping
from dlora.run.lock import sole_use
from dlora.run.manifest import manifest_hash, manifest_text
from dlora.run.prepare import Prepared, prepare
from dlora.run.schedules import first_step
from dlora.run.simulated import Run
from dlora.run.spent import Stopwatch, spent_before


def simulate(
    config: Config | str | Path,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], bool] = lambda: False,
    whole_process: bool = False,
) -> Summary:
    """Run Dec-LoRA and the baselines of ``config.compare``; return what summary.json holds. A path
    is that of a YAML.

    ``stop`` is asked after every round; once it says yes the round is saved and Interrupted raised.
    A listener may raise it while participants are scored. ``whole_process``: the start-up that the
    summary tells of begins with the process, not with this call. Raises UserError before anything
    is written when the run cannot start.
    """
    config, watch = Config.given(config), Stopwatch(whole_process)
    refuse_ranks(os.environ)
    if resume:
        RunFolder.check_same(config)
    else:
        RunFolder.check_new(config)
    prepared = prepare(config, loading(listeners), resume=resume)
    loaded(listeners)
    prepared.hand_frame()  # before anything else is written
    with sole_use(Path(config.output_dir)):
        return _simulated(prepared, resume, listeners, stop, watch)


def _simulated(
    prepared: Prepared,
    resume: bool,
    listeners: Sequence[Listener],
    stop: Callable[[], bool],
    watch: Stopwatch,
) -> Summary:
    config = prepared.config
    folder = (
        RunFolder.resume(config, manifest_text(prepared.manifest))
        if resume
        else RunFolder.create(config)
    )
    prepared.keep_frame()
    runs = (DEC_LORA.name, *config.compare)
    stored = {run: folder.latest(run) for run in runs}
    before = next((c.state["environment"]["group_size"] for c in stored.values() if c), None)
    group_size, one_at_a_time = find_grouping(prepared, before)
    wired = own_cloud(prepared.half, config) if prepared.half else contextlib.nullcontext()
    with RunLog(folder.log_path, listeners) as log, wired as cloud_bytes:
        if resume:
            log.truncate(
                max((c.result or c.state)["log_position"] if c else 0 for c in stored.values())
            )
        if log.position == 0:
            write_atomically(folder.path / "manifest.json", manifest_text(prepared.manifest))
            log.emit("start", **introduction(prepared, runs, group_size))
            if one_at_a_time is not None:
                log.emit("one-at-a-time", reason=one_at_a_time)
        started = time.monotonic()
        watch.started()
        results = {}
        for run in runs:
            checkpoint = stored[run]
            if checkpoint and checkpoint.result and checkpoint.rounds_done >= config.train.rounds:
                results[run] = checkpoint.result["result"]
            else:
                spent = watch.run(spent_before(checkpoint))
                results[run] = Run(
                    run, prepared, folder, log, group_size, stop, cloud_bytes, spent
                ).result(checkpoint)
        seconds = sum(result["seconds"] for result in results.values())
        summed = summary(prepared, results, prepared.manifest, group_size, seconds)
        log.emit("done", seconds=time.monotonic() - started)
    return conclude(folder, summed, watch)


def dry_run(config: Config, *, listeners: Sequence[Listener] = ()) -> Summary:
    """Check everything a run needs and say what it would be; nothing is written, where a run stands
    neither.
    """
    stands = RunFolder.standing(config)
    prepared = prepare(config, loading(listeners))
    return introduction(
        prepared, (DEC_LORA.name, *config.compare), find_grouping(prepared).size
    ) | {
        "local_steps": prepared.local_steps,
        **({"schedule": first_step(prepared)} if prepared.units else {}),
        **({"stands": stands} if stands else {}),
        "manifest": manifest_hash(prepared.manifest),
    }
