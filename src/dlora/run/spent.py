"""Where the time of a run goes: training, exchange, scoring, saving, start-up, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import psutil

from dlora.run.checkpoint_files import Checkpoint

KINDS = ("training", "exchange", "scoring", "saving")


class Spent:
    """The seconds of one run, by what they were spent on (``KINDS``).

    ``seconds``: in all processes of the run; ``before`` is what earlier processes spent.
    ``here_s``: in this process.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0) | dict(before or {})
        self.here_s = 0.0
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Count the time inside this context for ``kind``; an outer context does not count it."""
        self._turn()
        self._open.append(kind)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def add(self, kind: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self.seconds[kind] += seconds
        self.here_s += seconds

    def _turn(self) -> None:
        now = time.monotonic()
        if self._open:
            self.add(self._open[-1], now - self._since)
        self._since = now


class Stopwatch:
    """The seconds of one process, also before and after its runs.

    It begins with the process (``process``) or with this object.
    """

    def __init__(self, process: bool) -> None:
        self._began = time.monotonic() - (
            time.time() - psutil.Process().create_time() if process else 0.0
        )
        self._start_up_s = self._report_s = 0.0
        self._here: list[Spent] = []

    def started(self) -> None:
        """Note that everything is loaded and the runs begin."""
        self._start_up_s = time.monotonic() - self._began

    @property
    def running_s(self) -> float:
        """Seconds since `started`."""
        return time.monotonic() - self._began - self._start_up_s

    def run(self, before: Mapping[str, float] | None = None) -> Spent:
        """A new `Spent` for a run of this process."""
        self._here.append(Spent(before))
        return self._here[-1]

    @contextmanager
    def report(self) -> Iterator[None]:
        """Count the time inside this context for the report page."""
        began = time.monotonic()
        yield
        self._report_s = time.monotonic() - began

    def spent_s(self, runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
        """Seconds by kind, for the whole process.

        ``runs``: the seconds of each run, with those of its earlier processes.
        """
        known = self._start_up_s + self._report_s
        by_kind = {kind: sum(run.get(kind, 0.0) for run in runs) for kind in KINDS}
        other = max(
            0.0, time.monotonic() - self._began - known - sum(spent.here_s for spent in self._here)
        )
        parts = {"start_up": self._start_up_s, **by_kind, "report": self._report_s, "other": other}
        return {**parts, "in_all": sum(parts.values())}


def spent_before(stored: Checkpoint | None) -> dict[str, float]:
    """The seconds that earlier processes of a run spent, as its checkpoint says.

    A checkpoint of dlora 0.1.0 has one number for training and exchange; it counts as training.
    """
    if stored is None:
        return {}
    known: dict[str, float] = stored.state.get("spent_s") or {"training": stored.state["seconds"]}
    return known
