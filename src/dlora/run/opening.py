"""How a run is opened and closed: the same way for a simulation, a peer and a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.config.run import Config
from dlora.errors import CloudError, NeighbourError
from dlora.events.kinds import Done, OneAtATime
from dlora.events.log import Listener, RunLog, loaded, loading
from dlora.files import write_atomically
from dlora.run.account import Summary, conclude, introduction, summary
from dlora.run.folder import Checkpoint, RunFolder
from dlora.run.grouping import Grouping, find_grouping
from dlora.run.lock import sole_use
from dlora.run.manifest import manifest_text
from dlora.run.prepare import Prepared, prepare
from dlora.run.spent import Spent, Stopwatch, spent_before


@dataclass
class OpenRun:
    """A run whose folder and log are open.

    ``own``: the only participant that trains here; None: all of them do. ``stored``: the newest
    checkpoint of each arm.
    """

    prepared: Prepared
    own: str | None
    manifest: dict[str, Any]
    folder: RunFolder
    log: RunLog
    stored: Mapping[str, Checkpoint | None]
    group_size: int
    stop: Callable[[], bool]
    watch: Stopwatch
    # training has begun here: from now on the folder stays, even if the run fails
    began: bool = False

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.prepared.config

    def begin(self) -> None:
        """Note that everything is loaded and linked; from now on the folder is kept."""
        self.watch.started()
        self.began = True

    def finished(self, arm: str) -> Summary | None:
        """The result of an arm if it has done all its rounds in an earlier process, else None."""
        stored = self.stored[arm]
        if stored and stored.result and stored.rounds_done >= self.config.train.rounds:
            result: Summary = stored.result["result"]
            return result
        return None

    def spent(self, arm: str) -> Spent:
        """A counter for the seconds of an arm in this process; it begins with those of earlier
        processes.
        """
        return self.watch.run(spent_before(self.stored[arm]))

    def conclude(self, results: Mapping[str, Summary]) -> Summary:
        """Emit the last event, write summary.json and the report page; returns the summary."""
        seconds = sum(result["seconds"] for result in results.values())
        summed = summary(self.prepared, results, self.manifest, self.group_size, seconds, self.own)
        self.log.emit(Done(event="done", seconds=self.watch.running_s))
        self.log.close()
        return conclude(self.folder, summed, self.watch)


@contextmanager
def opened(
    config: Config,
    arms: Sequence[str],
    *,
    own: str | None = None,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], bool] = lambda: False,
    whole_process: bool = False,
    check: Callable[[Prepared], object] = lambda prepared: None,
) -> Iterator[OpenRun]:
    """Check and prepare all that a run needs, then make its folder or open it again.

    ``own``: the participant whose run it is; None: a simulation of all. ``check`` examines the
    prepared run before anything is written. ``whole_process``: the start-up time in the summary
    begins with the process and not with this call. Raises UserError before anything is written if
    the run cannot start. If a neighbour or the cloud refuses the run before it has trained, its new
    folder is removed again.
    """
    watch = Stopwatch(whole_process)
    if resume:
        RunFolder.check_same(config, own)
    else:
        RunFolder.check_new(config, own)
    prepared = prepare(config, loading(listeners), own=own, resume=resume)
    loaded(listeners)
    check(prepared)
    # a device has no weights and got its directions from the cloud
    if own is None or prepared.half is None:
        prepared.hand_directions()
    # Other peers run at the same time: they must agree on the number of rounds, and the log must
    # keep what happened between them.
    among_others = own is not None and bool(config.peers.members)
    manifest = prepared.manifest | ({"rounds": config.train.rounds} if among_others else {})
    with sole_use(Path(config.output_dir)):
        folder = (
            RunFolder.resume(config, manifest_text(manifest))
            if resume
            else RunFolder.create(config, own)
        )
        prepared.keep_directions()
        stored = {arm: folder.latest(arm) for arm in arms}
        grouping = _grouping(prepared, own, stored)
        with RunLog(folder.log_path, listeners) as log:
            if not among_others:
                log.truncate(_position(stored))
            if log.position == 0:
                write_atomically(folder.path / "manifest.json", manifest_text(manifest))
                log.emit(introduction(prepared, arms, grouping.size, own))
                if grouping.reason is not None:
                    log.emit(OneAtATime(event="one-at-a-time", reason=grouping.reason))
            run = OpenRun(prepared, own, manifest, folder, log, stored, grouping.size, stop, watch)
            try:
                yield run
            except (NeighbourError, CloudError):
                # when the cause is removed, the same command can start again
                if not (resume or run.began):
                    folder.remove()
                raise


def _grouping(
    prepared: Prepared, own: str | None, stored: Mapping[str, Checkpoint | None]
) -> Grouping:
    """How many participants train at once; 1 if only one trains here."""
    if own is not None:
        return Grouping(1, None)
    before = (one.state["environment"]["group_size"] for one in stored.values() if one)
    return find_grouping(prepared, next(before, None))


def _position(stored: Mapping[str, Checkpoint | None]) -> int:
    """The position in the log up to which it stays: what came after the last checkpoint is done and
    logged again.
    """
    return max((one.result or one.state)["log_position"] if one else 0 for one in stored.values())
