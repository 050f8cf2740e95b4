"""What happened: one JSON line an event; progress bars read it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from dlora.activity import Activity
from dlora.arms import Arm, arm_of
from dlora.errors import RunError

Event = dict[str, Any]
Listener = Callable[[Event], None]
BYTE_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
NBSP = "\u00a0"  # keeps a number and its unit on one line


class RunLog:
    """The log of one run: events are written and heard, ticks are only heard.

    A line counts once its newline is on the file: a torn one, left by a crash, is cut off on opening.
    Raises RunError when the file cannot be opened or written.
    """

    def __init__(self, path: str | Path, listeners: Iterable[Listener] = ()) -> None:
        self.path = Path(path)
        self._listeners = tuple(listeners)
        try:
            self._file = io.FileIO(self.path, "a+")  # unbuffered: an event is on the file before the listeners hear it
            torn_bytes = _torn_bytes(self._file)
            if torn_bytes:
                self._file.truncate(self._file.seek(0, os.SEEK_END) - torn_bytes)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def emit(self, event: str, **fields: Any) -> None:
        """Append one line, then tell the listeners; a number that is not finite becomes null."""
        entry: Event = {"event": event, "time": now(), **fields}
        line = (to_json(entry) + "\n").encode()
        start = self._file.seek(0, os.SEEK_END)
        try:
            view = memoryview(line)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise _cannot_write(self.path, error) from error
        self._tell(entry)

    def tick(self, event: str, **fields: Any) -> None:
        """Tell the listeners only: progress within a round, too frequent for the file."""
        self._tell({"event": event, "time": now(), **fields})

    @property
    def position(self) -> int:
        """Bytes written so far, all of them safe on the disk; what a checkpoint remembers for `truncate`."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return self._file.seek(0, os.SEEK_END)

    def truncate(self, position: int) -> None:
        """Forget what came after `position` bytes: a resumed run writes it again. RunError if not there."""
        size = self._file.seek(0, os.SEEK_END)
        if not 0 <= position <= size:
            raise RunError(
                f"log {self.path} holds {size} bytes, the checkpoint was made at {position}; "
                "it is not this run's log or was cut: restore it, or start in a new output_dir"
            )
        self._file.truncate(position)

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _tell(self, entry: Event) -> None:
        for listener in self._listeners:
            listener(entry)


def loading(listeners: Iterable[Listener]) -> Callable[[str], None]:
    """Tells the listeners what is being loaded: no line of a log, for there is no run yet."""

    def tell(text: str) -> None:
        for listener in listeners:
            listener({"event": "loading", "text": text})

    return tell


def loaded(listeners: Iterable[Listener]) -> None:
    """Tells the listeners that all is loaded, before the run's folder is made: from here on something can be lost."""
    for listener in listeners:
        listener({"event": "loaded"})


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; a number that is not finite becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def read_log(path: str | Path) -> list[Event]:
    """All events of a log in order; a torn last line (no newline) is ignored.

    Raises RunError when the file cannot be read, or naming the number (from 1) of a line that is no event.
    """
    try:
        *lines, _torn = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"log {path} cannot be read ({error.strerror}); give the folder of a run") from error
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise RunError(
                f"log {path}, line {number}: expected a JSON object with an event, "
                f"got {line[:40].decode(errors='replace')!r}; remove that line or restore the file"
            )
        events.append(event)
    return events


@dataclass(kw_only=True)
class RunRecord:
    """What one run did, from the log; the summary's figures, where there is one, are the same and come first."""

    name: str
    rounds: int = 0
    rounds_done: int = 0
    local_steps: list[int] = field(default_factory=list)  # of each participant in a round
    done: bool = False
    scores: dict[int, Event] = field(default_factory=dict)  # rounds_done -> the last scores event
    by_round: dict[int, Event] = field(default_factory=dict)  # round -> its event
    latest: Event = field(default_factory=dict)  # each field of these events as it was last said
    activity: Activity = field(default_factory=Activity)
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arm(self) -> Arm:
        """What it is in the comparison."""
        return arm_of(self.name)

    def figure(self, event: Mapping[str, Any], key: str) -> float | None:
        """The figure that counts: the average's; for peers that never talk, the mean of their own."""
        return (event.get(self.arm.counts) or {}).get(key)

    def last(self, of: str, default: Any = None) -> Any:
        """A field as the summary has it, else the last one logged that is not null."""
        if self.summary.get(of) is not None:
            return self.summary[of]
        return self.latest.get(of, default)


def run_records(events: Iterable[Event], start: Event, summary: Mapping[str, Any]) -> list[RunRecord]:
    """The events sorted by run, in the order of the start event; `summary` is summary.json, {} while unfinished."""
    runs = {name: RunRecord(name=name, summary=summary.get("runs", {}).get(name, {})) for name in start["runs"]}
    for event in events:
        run = runs.get(event.get("run", ""))
        if run is None:
            continue
        said = {key: value for key, value in event.items() if value is not None}
        if event["event"] in ("round", "scores"):
            run.latest |= said
        if event["event"] == "run":
            run.rounds, run.local_steps = event["rounds"], event.get("local_steps", run.local_steps)
        elif event["event"] == "round":
            run.by_round[event["round"]] = event
            run.rounds_done = event["round"] + 1
        elif event["event"] == "scores":
            # Peers' own scores may come in an event of their own after the average's: keep both.
            run.scores[event["rounds_done"]] = run.scores.get(event["rounds_done"], {}) | said
        elif event["event"] == "run-done":
            run.done = True
        else:
            run.activity.hear(event)
    return list(runs.values())


def score_text(value: float | None, key: str) -> str:
    """A score as people write it: accuracy and f1 in per cent, loss and perplexity as they are, a dash for none."""
    if value is None:
        return "–"
    if key in ("accuracy", "f1"):
        return percent_text(value)
    return f"{value:.3f}" if key == "loss" else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def error_text(error: float | None, key: str) -> str:
    """What stands behind the mean score of a sample: (s.e. 0.4), in points for accuracy and f1; nothing for all peers."""
    if error is None:
        return ""
    return f" (s.e.{NBSP}{100 * error:.1f})" if key in ("accuracy", "f1") else f" (s.e.{NBSP}{error:.2g})"


def percent_text(fraction: float) -> str:
    """A fraction in per cent: 12.4 %."""
    return f"{100 * fraction:.1f}{NBSP}%"


def count_text(count: float) -> str:
    """A mean of counts: 2,000 or 312, below a hundred with what is behind the point, 7.5."""
    return f"{count:,.0f}" if count >= 100 or count == round(count) else f"{count:.3g}"


def bytes_text(count: float | None) -> str:
    """A number of bytes in units of 1000: 12 B, 3.4 kB, 5.6 MB."""
    if count is None:
        return "–"
    unit, factor = unit_of(count, BYTE_UNITS)
    return f"{count / factor:.0f}{NBSP}{unit}" if unit == "B" or count / factor >= 100 else f"{count / factor:.1f}{NBSP}{unit}"


def seconds_text(seconds: float | None) -> str:
    """A duration in its two largest units: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def unit_of(value: float, units: Mapping[str, float]) -> tuple[str, float]:
    """The largest unit that the value fills at least once, else the first."""
    return next(((name, size) for name, size in reversed([*units.items()]) if value >= size), next(iter(units.items())))


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a whole file or nothing: under a temporary name beside it, synced, then renamed over it.

    Raises RunError when the disk is full or the place cannot be written; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no space left on device while writing {path}; free some, then go on with --resume")
    return RunError(f"{path} cannot be written ({error.strerror}); choose a place where you may write")


def _torn_bytes(file: io.FileIO) -> int:
    """Length of what follows the last newline, looked for from the end in blocks."""
    position, torn = file.seek(0, os.SEEK_END), 0
    while position:
        block = min(position, 1 << 16)
        position = file.seek(position - block)
        newline = file.read(block).rfind(b"\n")
        if newline >= 0:
            return torn + block - newline - 1
        torn += block
    return torn


def now() -> str:
    """The time of an event: UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
