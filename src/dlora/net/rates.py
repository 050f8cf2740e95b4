"""Limits how often something may happen: a burst at once, then a fixed rate per second."""

from __future__ import annotations


class Rate:
    """The limit for one member and one kind of event; times come from the event loop's clock.

    An event that comes too early must wait. It is refused if it would wait longer than ``queue_s``.
    """

    def __init__(self, per_s: float, burst: int, queue_s: float) -> None:
        self.per_s, self.burst, self.queue_s = per_s, burst, queue_s
        # events that count against the burst, and the time at which that number was right
        self._taken, self._at = 0.0, 0.0

    def take(self, now: float) -> float | None:
        """Seconds that the next event must wait; 0: it may happen at once.

        None: the wait would be longer than ``queue_s``; the event is refused and not counted.
        """
        self._taken = max(0.0, self._taken - (now - self._at) * self.per_s)
        self._at = now
        wait_s = max(0.0, (self._taken + 1 - self.burst) / self.per_s)
        if wait_s > self.queue_s:
            return None
        self._taken += 1
        return wait_s


class Told:
    """Limits the log lines that other members can cause, so that no one can fill the log.

    The first ``burst`` lines are logged, then ``per_s`` lines per second.
    """

    def __init__(self, per_s: float = 1.0, burst: int = 100) -> None:
        self._rate, self._left_out = Rate(per_s, burst, queue_s=0.0), 0

    def line(self, text: str, now: float) -> str | None:
        """The line to log now, with the number of lines left out before it; None: log nothing."""
        if self._rate.take(now) is None:
            self._left_out += 1
            return None
        more, self._left_out = self._left_out, 0
        return f"{text} ({more} more lines were left out before this one)" if more else text
