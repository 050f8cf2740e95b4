"""One part that runs in the cloud: which frame it waits for, and how it is told to stop."""

from __future__ import annotations

import queue
import time

from torch import Tensor

from dlora.wire.frame import Misbehaviour
from dlora.wire.split.frames import Begin, Values, What


class Gone(Exception):
    """The part was dropped, or the session has ended."""


class Work:
    """A part that runs: it waits for frames, and `put` gives it one.

    ``idle_s``: seconds that it waits for one frame.
    """

    def __init__(self, begin: Begin, idle_s: float) -> None:
        self.begin, self.idle_s = begin, idle_s
        self.waited_s, self._since, self.evicted = 0.0, 0.0, False
        self._inbox: queue.Queue[Values | None] = queue.Queue()
        self._gone = False

    @property
    def has_waited_s(self) -> float:
        """Seconds that the part has waited for its device so far, in all."""
        return self.waited_s + (time.monotonic() - since if (since := self._since) else 0.0)

    def put(self, frame: Values) -> None:
        """Give the part a frame. Raises Misbehaviour if the part has not taken the one before."""
        if not self._inbox.empty():
            raise Misbehaviour(f"{frame.what} for a part that has not taken the one before")
        self._inbox.put(frame)

    def end(self) -> None:
        """Tell the part to stop: its `hear` raises Gone."""
        self._gone = True
        self._inbox.put(None)

    def hear(self, what: What, unit: int, shape: tuple[int, int]) -> Tensor:
        """Wait for one frame, check it and return its tensor, of shape ``shape``.

        Raises TimeoutError after ``idle_s`` seconds, Gone if the part was told to stop, and
        Misbehaviour for another frame than the one asked for.
        """
        began_at = self._since = time.monotonic()
        try:
            frame = self._inbox.get(timeout=self.idle_s)
        except queue.Empty:
            raise TimeoutError(f"no {what} within {self.idle_s:g} s") from None
        finally:
            self.waited_s, self._since = self.waited_s + time.monotonic() - began_at, 0.0
        if frame is None or self._gone:
            raise Gone
        if (frame.what, frame.unit, tuple(frame.tensor.shape)) != (what, unit, shape):
            raise Misbehaviour(
                f"{frame.what} of unit {frame.unit}, shape {tuple(frame.tensor.shape)}, where"
                f" {what} of unit {unit}, shape {shape}, was due"
            )
        return frame.tensor
