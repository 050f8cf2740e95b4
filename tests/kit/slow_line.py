"""A line of a given speed and length between two network namespaces: a thread here between two
tunnel devices.

So no kernel needs a traffic shaper. Root only.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # of linux/if_tun.h
MAX_PACKET_BYTES = 65_535


class Speed(NamedTuple):
    """Of a line, each way."""

    bytes_s: float
    one_way_s: float
    queue_s: float = 0.6  # packets that would wait for longer are dropped
    packet_bytes: int = 1500  # fewer and larger packets cost this machine less


def command(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


class Line(threading.Thread):
    """A line each way between two tunnel devices: packets wait their turn, travel, or are dropped
    when too many wait.
    """

    def __init__(self, names: Sequence[str], speed: Speed) -> None:
        super().__init__(daemon=True)
        self.speed, self.ends = speed, list[int]()
        for name in names:
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            self.ends.append(end)
            fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        self.over = False

    def run(self) -> None:
        """Carry packets until ``over``."""
        free_at = dict.fromkeys(self.ends, 0.0)  # when the last byte accepted has left this end
        # (arrival, end, packet) of both directions
        flying: deque[tuple[float, int, bytes]] = deque()
        other = dict(zip(self.ends, reversed(self.ends), strict=True))
        while not self.over:
            ready, _, _ = select.select(self.ends, [], [], 0.002 if flying else 0.1)
            now = time.monotonic()
            for end in ready:
                with suppress(OSError):
                    packet = os.read(end, MAX_PACKET_BYTES)
                    if free_at[end] - now < self.speed.queue_s:
                        free_at[end] = max(free_at[end], now) + len(packet) / self.speed.bytes_s
                        flying.append((free_at[end] + self.speed.one_way_s, other[end], packet))
            for _ in range(len(flying)):
                arrival, end, packet = flying.popleft()
                if arrival > now:
                    # the order within a direction stays: all are looked at
                    flying.append((arrival, end, packet))
                else:
                    with suppress(OSError):
                        os.write(end, packet)

    def close(self) -> None:
        """End the line; the devices go with it."""
        self.over = True
        if self.is_alive():
            self.join(5)
        for end in self.ends:
            os.close(end)


@contextmanager
def namespaces(lines: Sequence[Mapping[str, str]], speed: Speed) -> Iterator[dict[str, str]]:
    """Member -> the name of its network namespace. Each of ``lines`` gives two members an address
    each on a line of their own.

    Raises OSError where this machine does not let us.
    """
    members = sorted({name for line in lines for name in line})
    spaces = {name: f"dlora-{os.getpid()}-{name}" for name in members}
    with ExitStack() as undo:
        for space in spaces.values():
            command("ip", "netns", "add", space)
            undo.callback(command, "ip", "netns", "delete", space)
            command("ip", "-n", space, "link", "set", "lo", "up")
        for number, ends in enumerate(lines):
            devices = {name: f"dl{os.getpid()}x{number}{place}" for place, name in enumerate(ends)}
            line = Line(list(devices.values()), speed)
            undo.callback(line.close)
            for name, address in ends.items():
                own = f"line{number}"
                command("ip", "link", "set", devices[name], "netns", spaces[name], "name", own)
                command("ip", "-n", spaces[name], "address", "add", f"{address}/24", "dev", own)
                command(
                    "ip", "-n", spaces[name], "link", "set", own, "mtu", speed.packet_bytes, "up"
                )
            line.start()
        yield spaces
