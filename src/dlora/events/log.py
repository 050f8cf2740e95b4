"""The log of a run: one JSON line an event; progress bars hear it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dlora.errors import RunError
from dlora.events.kinds import Event, Loaded, Logged
from dlora.events.timed import Loading, with_time
from dlora.files import cannot_write

LogLine = dict[str, Any]  # an event as a log has it; another version may have written it
Listener = Callable[[Event], None]


class JsonLines:
    """A file of JSON objects, one a line, to which lines are only added.

    A line counts once its newline is on the file: a torn one, left by a crash, is cut off on
    opening. Raises RunError when the file cannot be opened or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            # unbuffered: a line is on the file when `append` returns
            self._file = io.FileIO(self.path, "a+")
            torn_bytes = _torn_bytes(self._file)
            if torn_bytes:
                self._file.truncate(self._file.seek(0, os.SEEK_END) - torn_bytes)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def append(self, entry: Mapping[str, object]) -> None:
        """Append one line; a number that is not finite becomes null."""
        line = (to_json(entry) + "\n").encode()
        start = self._file.seek(0, os.SEEK_END)
        try:
            view = memoryview(line)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise cannot_write(self.path, error) from error

    @property
    def position(self) -> int:
        """Bytes written so far, all of them safe on the disk; what a checkpoint remembers for
        `truncate`.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        return self._file.seek(0, os.SEEK_END)

    def truncate(self, position: int) -> None:
        """Forget what came after `position` bytes: a resumed run writes it again. RunError if not
        there.
        """
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class RunLog(JsonLines):
    """The log of one run: events are written and heard, ticks are only heard.

    Any thread may call it; the listeners hear one event at a time.
    """

    def __init__(self, path: str | Path, listeners: Iterable[Listener] = ()) -> None:
        super().__init__(path)
        self._listeners = tuple(listeners)
        self._one_at_a_time = threading.RLock()

    def emit(self, event: Logged) -> None:
        """Write an event, then tell the listeners."""
        with self._one_at_a_time:
            timed = with_time(event)
            self.append(timed)
            self._tell(timed)

    def tick(self, event: Event) -> None:
        """Tell the listeners only: progress within a round, too frequent for the file."""
        with self._one_at_a_time:
            self._tell(with_time(event))

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)


class UnwrittenLog(RunLog):
    """The log of a process that writes none, because another process of the run does."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self._listeners = tuple(listeners)
        self._one_at_a_time = threading.RLock()

    def append(self, entry: Mapping[str, object]) -> None:
        """Write nothing."""

    @property
    def position(self) -> int:
        """0, since nothing was written."""
        return 0

    def close(self) -> None:
        """Do nothing: no file is open."""


def loading(listeners: Iterable[Listener]) -> Callable[[str], None]:
    """Tells the listeners what is being loaded: no line of a log, for there is no run yet."""

    def tell(text: str) -> None:
        for listener in listeners:
            listener(Loading(event="loading", text=text))

    return tell


def loaded(listeners: Iterable[Listener]) -> None:
    """Tells the listeners that all is loaded, before the run's folder is made: from here on
    something can be lost.
    """
    for listener in listeners:
        listener(Loaded(event="loaded"))


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; a number that is not finite becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def read_log(path: str | Path) -> list[LogLine]:
    """All events of a log in order; a torn last line (no newline) is ignored.

    Raises RunError when the file cannot be read, or naming the number (from 1) of a line that is no
    event.
    """
    try:
        *lines, _torn = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(
            f"log {path} cannot be read ({error.strerror}); give the folder of a run"
        ) from error
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


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
