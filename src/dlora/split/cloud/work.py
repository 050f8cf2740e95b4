"""One part under way in the cloud: what it waits for, and how it is woken up to go."""

from __future__ import annotations

import queue
import time

from torch import Tensor

from dlora.wire.frame import Misbehaviour
from dlora.wire.split.frames import Begin, Values, What


class Gone(Exception):
    """The part was dropped, or the session is over."""


class Work:
    """A part under way: what it waits for, and where that is put."""

    def __init__(self, begin: Begin, idle_s: float) -> None:
        self.begin, self.idle_s = begin, idle_s
        self.waited_s, self._since, self.evicted = 0.0, 0.0, False
        self._inbox: queue.Queue[Values | None] = queue.Queue()
        self._gone = False

    @property
    def has_waited_s(self) -> float:
        """Seconds that it has waited for its device so far."""
        return self.waited_s + (time.monotonic() - since if (since := self._since) else 0.0)

    def put(self, frame: Values) -> None:
        """Hand over a frame; only one is ever waited for."""
        if not self._inbox.empty():
            raise Misbehaviour(f"{frame.what} for a part that has not taken the one before")
        self._inbox.put(frame)

    def end(self) -> None:
        """Wake the part up to go."""
        self._gone = True
        self._inbox.put(None)

    def hear(self, what: What, group: int, shape: tuple[int, int]) -> Tensor:
        """Wait for one frame and check it. Raises TimeoutError after ``idle_s``."""
        began_at = self._since = time.monotonic()
        try:
            frame = self._inbox.get(timeout=self.idle_s)
        except queue.Empty:
            raise TimeoutError(f"no {what} within {self.idle_s:g} s") from None
        finally:
            self.waited_s, self._since = self.waited_s + time.monotonic() - began_at, 0.0
        if frame is None or self._gone:
            raise Gone
        if (frame.what, frame.group, tuple(frame.tensor.shape)) != (what, group, shape):
            raise Misbehaviour(
                f"{frame.what} of group {frame.group}, shape {tuple(frame.tensor.shape)}, where"
                f" {what} of group {group}, shape {shape}, was due"
            )
        return frame.tensor
