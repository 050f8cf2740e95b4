"""How often somebody may do something: a number at once, then so many a second."""

from __future__ import annotations


class Rate:
    """One member's budget for one kind of thing; times are the event loop's.

    What comes too fast is put off, until ``queue_s`` would not be enough for it to wait its turn.
    """

    def __init__(self, per_s: float, burst: int, queue_s: float) -> None:
        self.per_s, self.burst, self.queue_s = per_s, burst, queue_s
        self._taken, self._at = 0.0, 0.0  # that are not made up for yet, at that time

    def take(self, now: float) -> float | None:
        """Seconds until one more is due, 0 for at once; None, and it does not count, where the
        queue is too long.
        """
        self._taken = max(0.0, self._taken - (now - self._at) * self.per_s)
        self._at = now
        wait_s = max(0.0, (self._taken + 1 - self.burst) / self.per_s)
        if wait_s > self.queue_s:
            return None
        self._taken += 1
        return wait_s


class Told:
    """What is said of others' doings, so that nobody fills a log: the first lines, then one a
    second.
    """

    def __init__(self, per_s: float = 1.0, burst: int = 100) -> None:
        self._rate, self._left_out = Rate(per_s, burst, queue_s=0.0), 0

    def line(self, text: str, now: float) -> str | None:
        """The line to say now, None for none; it tells how many were left out before it."""
        if self._rate.take(now) is None:
            self._left_out += 1
            return None
        more, self._left_out = self._left_out, 0
        return f"{text} ({more} more lines were left out before this one)" if more else text
