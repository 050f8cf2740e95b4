"""How a run is opened and closed: the same way for a simulation, a peer and a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.config.arms import ARMS
from dlora.config.launchers import launch_name
from dlora.config.run import Config
from dlora.data.formats import rows_hash
from dlora.errors import CloudError, ConfigError, NeighbourError, RunError
from dlora.events.kinds import Done, OneAtATime
from dlora.events.log import Listener, RunLog, UnwrittenLog, loaded, loading, to_json
from dlora.files import write_atomically
from dlora.lora.factors import Zeros
from dlora.run.account import Summary, conclude, introduction, summary
from dlora.run.checkpoint_files import Checkpoint
from dlora.run.folder import RunFolder, leaves
from dlora.run.grouping import Grouping, find_grouping
from dlora.run.lock import sole_use
from dlora.run.manifest import manifest_text
from dlora.run.prepare import Prepared, prepare
from dlora.run.ranks import ALONE, Ranks
from dlora.run.spent import Spent, Stopwatch, spent_before
from dlora.run.waiting import find_waiting

LAUNCH_FILE = "launch"  # the start of torchrun that opened the folder


@dataclass
class OpenRun:
    """A run whose folder and log are open.

    ``own``: the only participant that trains here; None: all of them do. ``stored``: the newest
    checkpoint of each arm. ``zeros``: makes the state of all where it does not fit into memory.
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
    zeros: Zeros | None = None
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

        def write() -> Summary:
            summed = summary(
                self.prepared, results, self.manifest, self.group_size, seconds, self.own
            )
            self.log.emit(Done(event="done", seconds=self.watch.running_s))
            self.log.close()
            return conclude(self.folder, summed, self.watch)

        return self.prepared.ranks.on_main(write)


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
    ranks: Ranks = ALONE,
    check: Callable[[Prepared], object] = lambda prepared: None,
) -> Iterator[OpenRun]:
    """Check and prepare all that a run needs, then make its folder or open it again.

    ``own``: the participant whose run it is; None: a simulation of all. ``check`` examines the
    prepared run before anything is written. ``whole_process``: the start-up time in the summary
    begins with the process and not with this call. ``ranks``: the processes of a simulation, which
    all call this; each writes its part of a checkpoint, and the main one all the rest. Raises
    UserError before anything is written if the run cannot start. If a neighbour or the cloud
    refuses the run before it has trained, its new folder is removed again.
    """
    watch = Stopwatch(whole_process)
    ranks.on_main(lambda: (RunFolder.check_same if resume else RunFolder.check_new)(config, own))
    # before the ranks divide a model, which must be the same
    _check_alike(ranks, leaves(config.model_dump(mode="json")))
    prepared = prepare(config, loading(listeners), own=own, resume=resume, ranks=ranks)
    loaded(listeners)
    check_alike(ranks, prepared)
    check(prepared)
    zeros = find_waiting(prepared) if own is None else None
    # a device has no weights and got its directions from the cloud
    if own is None or prepared.half is None:
        ranks.on_main(prepared.hand_directions)
    # Other peers run at the same time: they must agree on the number of rounds, and the log must
    # keep what happened between them.
    among_others = own is not None and bool(config.peers.members)
    manifest = prepared.manifest | ({"rounds": config.train.rounds} if among_others else {})
    with ExitStack() as held:

        def open_folder() -> None:
            held.enter_context(sole_use(Path(config.output_dir)))
            if resume:
                RunFolder.resume(config, manifest_text(manifest))
            else:
                RunFolder.create(config, own)
            prepared.keep_directions()
            prepared.keep_adapter()
            prepared.keep_taken_out()
            if ranks.are_several:
                write_atomically(Path(config.output_dir, LAUNCH_FILE), launch_name(os.environ))

        ranks.on_main(open_folder)
        folder = RunFolder(Path(config.output_dir), prepared.ranks)
        # in a site each process reads it all; the first must not write before they have read it
        stored = prepared.site.together(
            lambda: {
                arm: folder.latest(arm, None if ARMS[arm].pooled else prepared.here) for arm in arms
            }
        )
        found = {arm: one and one.rounds_done for arm, one in stored.items()}
        if any(other != found for other in prepared.site.gathered(found)):
            raise prepared.site.told_once(
                RunError(
                    f"{config.output_dir}: the processes of this peer do not find the same"
                    " checkpoint there; put output_dir on a disk that all of them share"
                )
            )
        grouping = _grouping(prepared, own, stored, zeros is not None)

        def begin_log(log: RunLog) -> None:
            if not among_others:
                log.truncate(_position(stored))
            if log.position == 0:
                write_atomically(folder.path / "manifest.json", manifest_text(manifest))
                log.emit(introduction(prepared, arms, grouping.size, own))
                if grouping.reason is not None:
                    log.emit(OneAtATime(event="one-at-a-time", reason=grouping.reason))

        with (
            RunLog(folder.log_path, listeners) if ranks.is_main else UnwrittenLog(listeners) as log
        ):
            ranks.on_main(lambda: begin_log(log))
            run = OpenRun(
                prepared, own, manifest, folder, log, stored, grouping.size, stop, watch, zeros
            )
            try:
                yield run
            except (NeighbourError, CloudError):
                # when the cause is removed, the same command can start again
                if not (resume or run.began) and ranks.is_main:
                    folder.remove()
                raise


def check_alike(ranks: Ranks, prepared: Prepared) -> None:
    """Raise ConfigError if the ranks have different models or rows."""
    facts = {f"the {key} of the run": value for key, value in prepared.manifest.items()}
    facts |= {
        f"rows of {name}": rows_hash(rows)
        for name, rows in {**prepared.data.peers, "data.eval": prepared.data.evaluation}.items()
    }
    _check_alike(ranks, facts)


def _check_alike(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError if a fact of another rank differs from that of the main one."""
    if not ranks.are_several:
        return
    main, *others = ranks.gathered({key: to_json(value) for key, value in facts.items()})
    for rank, other in enumerate(others, start=1):
        for key in {**main, **other}:
            if main.get(key) != other.get(key):
                raise ranks.told_once(
                    ConfigError(
                        f"rank {rank} of {ranks.size} is in another run: {key} is"
                        f" {other.get(key)} there and {main.get(key)} at rank 0; give all the same"
                        " config and the same files"
                    )
                )


def began_here(config: Config) -> bool:
    """Whether the start of torchrun that this process belongs to has opened the run's folder."""
    try:
        return Path(config.output_dir, LAUNCH_FILE).read_text() == launch_name(os.environ)
    except (OSError, ValueError):
        return False


def _grouping(
    prepared: Prepared,
    own: str | None,
    stored: Mapping[str, Checkpoint | None],
    waiting: bool,
) -> Grouping:
    """How many participants train at once; 1 if only one trains here."""
    if own is not None:
        return Grouping(1, None)
    # another number of ranks shares the memory in another way
    before = (
        environment["group_size"]
        for environment in (one.state["environment"] for one in stored.values() if one)
        if environment.get("ranks", 1) == prepared.ranks.size
    )
    return find_grouping(prepared, next(before, None), waiting)


def _position(stored: Mapping[str, Checkpoint | None]) -> int:
    """The position in the log up to which it stays: what came after the last checkpoint is done and
    logged again.
    """
    return max((one.result or one.state)["log_position"] if one else 0 for one in stored.values())
