"""How a run is opened and closed: the same way for a simulation, a peer and a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.config.run import Config
from dlora.errors import CloudError, NeighbourError
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
    """A run whose folder and log are open. ``own``: the one participant that trains here; None: all
    of them do. ``stored``: the newest checkpoint of each of its arms.
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
    # something is trained here: from now on the folder stays whatever comes
    began: bool = False

    @property
    def config(self) -> Config:
        """What the user asked for."""
        return self.prepared.config

    def begin(self) -> None:
        """All is loaded and linked; what trains now is kept."""
        self.watch.started()
        self.began = True

    def finished(self, arm: str) -> Summary | None:
        """The result of an arm that has done all its rounds in an earlier process."""
        stored = self.stored[arm]
        if stored and stored.result and stored.rounds_done >= self.config.train.rounds:
            result: Summary = stored.result["result"]
            return result
        return None

    def spent(self, arm: str) -> Spent:
        """Where the time of an arm goes, from here on."""
        return self.watch.run(spent_before(self.stored[arm]))

    def conclude(self, results: Mapping[str, Summary]) -> Summary:
        """The last event, summary.json and the page; returns the summary."""
        seconds = sum(result["seconds"] for result in results.values())
        summed = summary(self.prepared, results, self.manifest, self.group_size, seconds, self.own)
        self.log.emit("done", seconds=self.watch.running_s)
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
    """Check and prepare all that a run needs, then make its folder or take it up again.

    ``own``: the participant whose run it is; None: a simulation of all. ``check`` looks at what is
    prepared, before anything is written. ``whole_process``: the start-up that the summary tells of
    began with the process. Raises UserError before anything is written when the run cannot start.
    Where a neighbour or the cloud refuses it before it trained anything, its folder goes again.
    """
    watch = Stopwatch(whole_process)
    if resume:
        RunFolder.check_same(config, own)
    else:
        RunFolder.check_new(config, own)
    prepared = prepare(config, loading(listeners), own=own, resume=resume)
    loaded(listeners)
    check(prepared)
    if own is None or prepared.half is None:  # a device has no weights
        prepared.hand_directions()
    # Others take part while it goes on: they agree on its rounds, and hear of what its log says.
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
                log.emit("start", **introduction(prepared, arms, grouping.size, own))
                if grouping.reason is not None:
                    log.emit("one-at-a-time", reason=grouping.reason)
            run = OpenRun(prepared, own, manifest, folder, log, stored, grouping.size, stop, watch)
            try:
                yield run
            except (NeighbourError, CloudError):
                if not (resume or run.began):  # once that is right, the same command starts anew
                    folder.remove()
                raise


def _grouping(
    prepared: Prepared, own: str | None, stored: Mapping[str, Checkpoint | None]
) -> Grouping:
    """How many train at once: one where there is one only."""
    if own is not None:
        return Grouping(1, None)
    before = (one.state["environment"]["group_size"] for one in stored.values() if one)
    return find_grouping(prepared, next(before, None))


def _position(stored: Mapping[str, Checkpoint | None]) -> int:
    """Up to where the log stays: what came after the last checkpoint is done, and told, again."""
    return max((one.result or one.state)["log_position"] if one else 0 for one in stored.values())
