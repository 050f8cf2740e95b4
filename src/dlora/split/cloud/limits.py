"""What a device may use of a cloud, and how devices share memory and turns to compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one device may ask for."""

    max_tokens: int  # of all its parts that are in the cloud at once
    max_parts: int
    idle_s: float  # seconds that a part waits for the next frame of its device


# seconds: a part that has waited longer for its device may be given up when another device waits
# for memory
PATIENCE_S = 5.0


class Budget:
    """Memory for the activations of all devices together, and the turns in which parts compute.

    Free memory goes to the device that asks for it. When memory is short, a device that holds less
    than an equal share waits for its share. Meanwhile no device gets memory beyond its share. A
    device that holds more than its share and lets the cloud wait loses parts.
    """

    def __init__(self, num_bytes: int, at_once: int = 1) -> None:
        self.num_bytes, self.turns = num_bytes, Turns(at_once)
        self._held: dict[str, int] = {}  # by device
        self._waiting: dict[str, int] = {}  # by device: the bytes that it waits for
        self._changed = threading.Condition()

    def take(self, device: str, num_bytes: int) -> bool | None:
        """Take ``num_bytes`` for ``device``: True if taken, False if refused.

        None: there is no room yet, but the bytes are within the device's share; `wait` will take
        them.
        """
        with self._changed:
            if self._gives(device, num_bytes):
                self._held[device] = self._held.get(device, 0) + num_bytes
                return True
            if not self._is_due(device, num_bytes):
                return False
            self._waiting[device] = self._waiting.get(device, 0) + num_bytes
            return None

    def wait(
        self, device: str, num_bytes: int, limit_s: float, evict: Callable[[set[str]], object]
    ) -> bool:
        """Wait for the bytes for which `take` returned None; returns whether they are taken now.

        ``evict`` is called again and again with the devices that hold more than a share. Gives up
        after ``limit_s`` seconds.
        """
        until = time.monotonic() + limit_s
        with self._changed:
            self._waiting[device] -= num_bytes
            try:
                while not self._gives(device, num_bytes):
                    if not self._is_due(device, num_bytes) or time.monotonic() > until:
                        return False
                    share = self._share(device)
                    greedy = {
                        other
                        for other, held in self._held.items()
                        if held > share and other != device
                    }
                    self._waiting[device] += num_bytes
                    self._changed.release()
                    try:
                        evict(greedy)
                    finally:
                        self._changed.acquire()
                    self._changed.wait(0.1)
                    self._waiting[device] -= num_bytes
                self._held[device] = self._held.get(device, 0) + num_bytes
                return True
            finally:
                if not self._waiting[device]:
                    del self._waiting[device]
                self._changed.notify_all()

    def forgo(self, device: str, num_bytes: int) -> None:
        """Do not wait for the bytes for which `take` returned None."""
        with self._changed:
            self._waiting[device] -= num_bytes
            if not self._waiting[device]:
                del self._waiting[device]

    def give_back(self, device: str, num_bytes: int) -> None:
        """Give back bytes that were taken."""
        with self._changed:
            self._held[device] -= num_bytes
            if not self._held[device]:
                del self._held[device]
            self._changed.notify_all()

    @property
    def free_bytes(self) -> int:
        """Bytes that no device holds."""
        return self.num_bytes - sum(self._held.values())

    def _gives(self, device: str, num_bytes: int) -> bool:
        others = sum(due for other, due in self._waiting.items() if other != device)
        # keep free what the others wait for
        kept = 0 if self._is_due(device, num_bytes) else others
        return num_bytes + kept <= self.free_bytes

    def _is_due(self, device: str, num_bytes: int) -> bool:
        return self._held.get(device, 0) + num_bytes <= self._share(device)

    def _share(self, device: str) -> int:
        return self.num_bytes // len({device, *self._held, *self._waiting})


class Turns:
    """At most ``at_once`` parts compute at a time. The next turn goes to the device that has
    computed least.

    Without turns, the threads of all parts would get equal time, and a device with more parts would
    get more of it. One part alone uses all of torch's threads, or the GPU: running more parts at
    once gains nothing.
    """

    def __init__(self, at_once: int = 1) -> None:
        self._changed = threading.Condition()
        # seconds of computing, for each device that has a part here
        self._used_s: dict[str, float] = {}
        self._users: dict[str, int] = {}  # parts here, by device
        self._waiting: dict[str, int] = {}
        self._free = at_once

    @contextmanager
    def part(self, device: str) -> Iterator[Turn]:
        """Register a part of ``device`` for the time of this context. The part has no turn yet."""
        with self._changed:
            # A new device starts with the least time of the devices here: it gets no credit for the
            # time before it came.
            if device not in self._users:
                self._used_s[device] = min(self._used_s.values(), default=0.0)
            self._users[device] = self._users.get(device, 0) + 1
        turn = Turn(self, device)
        try:
            yield turn
        finally:
            turn.end()
            with self._changed:
                self._users[device] -= 1
                if not self._users[device]:
                    del self._users[device], self._used_s[device]

    def begin(self, device: str) -> None:
        """Wait until ``device`` gets a turn."""
        with self._changed:
            self._waiting[device] = self._waiting.get(device, 0) + 1
            try:
                self._changed.wait_for(lambda: self._free > 0 and device == self._next())
                self._free -= 1
            finally:
                self._waiting[device] -= 1
                if not self._waiting[device]:
                    del self._waiting[device]
                # another turn may be free, and now it is another device's
                self._changed.notify_all()

    def end(self, device: str, seconds: float) -> None:
        """End a turn that lasted ``seconds``."""
        with self._changed:
            self._free += 1
            self._used_s[device] += seconds
            self._changed.notify_all()

    def _next(self) -> str:
        return min(self._waiting, key=lambda device: (self._used_s[device], device))


class Turn:
    """One part's turns. It has a turn while it computes, and none while it waits for its device."""

    def __init__(self, turns: Turns, device: str) -> None:
        self._turns, self._device = turns, device
        self._began_at: float | None = None

    def begin(self) -> None:
        """Wait for a turn."""
        self._turns.begin(self._device)
        self._began_at = time.monotonic()

    def end(self) -> None:
        """Give the turn to others; does nothing if this part has none."""
        if self._began_at is not None:
            seconds, self._began_at = time.monotonic() - self._began_at, None
            self._turns.end(self._device, seconds)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Give the turn up inside this context, and wait for a new one at its end."""
        self.end()
        yield
        self.begin()
