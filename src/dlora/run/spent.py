"""Where the time of a run goes: training, exchange, scoring, saving, and what comes before and
after.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import psutil

from dlora.run.folder import Checkpoint

KINDS = ("training", "exchange", "scoring", "saving")


class Spent:
    """The seconds of one run by what they went into.

    ``seconds``: in all processes of the run, of which ``before`` is what earlier ones spent;
    ``here_s``: in this one.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0) | dict(before or {})
        self.here_s = 0.0
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """What happens inside goes into ``kind``; inside another one, it is not counted there."""
        self._turn()
        self._open.append(kind)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def add(self, kind: str, seconds: float) -> None:
        """Seconds that were measured elsewhere."""
        self.seconds[kind] += seconds
        self.here_s += seconds

    def _turn(self) -> None:
        now = time.monotonic()
        if self._open:
            self.add(self._open[-1], now - self._since)
        self._since = now


class Stopwatch:
    """The seconds of one process, from its start (``process``) or from the call of a program: also
    those before and after its runs.
    """

    def __init__(self, process: bool) -> None:
        self._began = time.monotonic() - (
            time.time() - psutil.Process().create_time() if process else 0.0
        )
        self._start_up_s = self._report_s = 0.0
        self._here: list[Spent] = []

    def started(self) -> None:
        """All is loaded; the runs begin."""
        self._start_up_s = time.monotonic() - self._began

    @property
    def running_s(self) -> float:
        """Since `started`."""
        return time.monotonic() - self._began - self._start_up_s

    def run(self, before: Mapping[str, float] | None = None) -> Spent:
        """A run of this process."""
        self._here.append(Spent(before))
        return self._here[-1]

    @contextmanager
    def report(self) -> Iterator[None]:
        """The page is written inside."""
        began = time.monotonic()
        yield
        self._report_s = time.monotonic() - began

    def spent_s(self, runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
        """Where all of the time went; of ``runs`` that went over several processes, in all of
        them.
        """
        known = self._start_up_s + self._report_s
        by_kind = {kind: sum(run.get(kind, 0.0) for run in runs) for kind in KINDS}
        other = max(
            0.0, time.monotonic() - self._began - known - sum(spent.here_s for spent in self._here)
        )
        parts = {"start_up": self._start_up_s, **by_kind, "report": self._report_s, "other": other}
        return {**parts, "in_all": sum(parts.values())}


def spent_before(stored: Checkpoint | None) -> dict[str, float]:
    """What earlier processes of a run spent, as its checkpoint says; one of version 0.1.0 knows
    training and exchange only.
    """
    if stored is None:
        return {}
    known: dict[str, float] = stored.state.get("spent_s") or {"training": stored.state["seconds"]}
    return known
