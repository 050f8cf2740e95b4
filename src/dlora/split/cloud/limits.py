"""What one device may take of a cloud, and how all share it fairly: memory for parts, turns to
compute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one device may ask for."""

    max_tokens: int  # of all its parts in the cloud at once
    max_parts: int
    idle_s: float  # that a part waits for the device's next word


# that a device's own answers may have taken, of a part whose memory another device waits for
PATIENCE_S = 5.0


class Budget:
    """Memory for all devices' activations together, and the turns that their parts take.

    Memory that is free goes to whoever asks. Once it is short, a device that holds less than an
    equal share of it waits for its share, and nobody above one is given any meanwhile; who holds
    more and lets the cloud wait loses parts to it.
    """

    def __init__(self, num_bytes: int, at_once: int = 1) -> None:
        self.num_bytes, self.turns = num_bytes, Turns(at_once)
        self._held: dict[str, int] = {}  # by device
        self._waiting: dict[str, int] = {}  # by device: its share that it waits for
        self._changed = threading.Condition()

    def take(self, device: str, num_bytes: int) -> bool | None:
        """Whether it is taken; None: it is this device's due, and `wait` will get it."""
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
        """Whether what `take` found due is taken now; ``evict`` hears who holds more than a share,
        again and again.
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
        """What `take` found due is not waited for after all."""
        with self._changed:
            self._waiting[device] -= num_bytes
            if not self._waiting[device]:
                del self._waiting[device]

    def give_back(self, device: str, num_bytes: int) -> None:
        """What was taken is free again."""
        with self._changed:
            self._held[device] -= num_bytes
            if not self._held[device]:
                del self._held[device]
            self._changed.notify_all()

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return self.num_bytes - sum(self._held.values())

    def _gives(self, device: str, num_bytes: int) -> bool:
        others = sum(due for other, due in self._waiting.items() if other != device)
        kept = 0 if self._is_due(device, num_bytes) else others  # what others wait for is theirs
        return num_bytes + kept <= self.free_bytes

    def _is_due(self, device: str, num_bytes: int) -> bool:
        return self._held.get(device, 0) + num_bytes <= self._share(device)

    def _share(self, device: str) -> int:
        return self.num_bytes // len({device, *self._held, *self._waiting})


class Turns:
    """``at_once`` parts compute at a time, and the next is of the device that has computed least.

    Threads of many parts side by side would each get the same time, so a device would get as much
    as it has parts. A part computes with as many cores as torch has threads, or with the GPU: more
    parts than there are of these gain nothing.
    """

    def __init__(self, at_once: int = 1) -> None:
        self._changed = threading.Condition()
        self._used_s: dict[str, float] = {}  # of devices with a part here
        self._users: dict[str, int] = {}  # parts here
        self._waiting: dict[str, int] = {}
        self._free = at_once

    @contextmanager
    def part(self, device: str) -> Iterator[Turn]:
        """While a part is here. It has no turn yet."""
        with self._changed:
            # it begins with the least of those that are here: absence is no credit
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
        """Wait for a turn."""
        with self._changed:
            self._waiting[device] = self._waiting.get(device, 0) + 1
            try:
                self._changed.wait_for(lambda: self._free > 0 and device == self._next())
                self._free -= 1
            finally:
                self._waiting[device] -= 1
                if not self._waiting[device]:
                    del self._waiting[device]
                self._changed.notify_all()  # another device may be the next for what is free still

    def end(self, device: str, seconds: float) -> None:
        """The turn is over, after so long."""
        with self._changed:
            self._free += 1
            self._used_s[device] += seconds
            self._changed.notify_all()

    def _next(self) -> str:
        return min(self._waiting, key=lambda device: (self._used_s[device], device))


class Turn:
    """The turn of one part, which has it while it computes and not while it waits for its
    device.
    """

    def __init__(self, turns: Turns, device: str) -> None:
        self._turns, self._device = turns, device
        self._began_at: float | None = None

    def begin(self) -> None:
        """Wait for it."""
        self._turns.begin(self._device)
        self._began_at = time.monotonic()

    def end(self) -> None:
        """Let others go on; nothing where it was not had."""
        if self._began_at is not None:
            seconds, self._began_at = time.monotonic() - self._began_at, None
            self._turns.end(self._device, seconds)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Without a turn meanwhile."""
        self.end()
        yield
        self.begin()
