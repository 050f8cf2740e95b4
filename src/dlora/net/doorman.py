"""Closes the oldest connections of strangers when there are many, so that members can connect.

gRPC does the TLS handshake itself, so Python never sees a caller that fails it. Python can see the
sockets of its own process. When too many sockets at the listener's port belong to no link, the
oldest are shut down. A member finishes its handshake quickly, so the old connections belong to
strangers.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

OPEN_FILES = "/dev/fd"  # the open files of this process, on Linux and macOS

Place = tuple[str, int]  # host and port of the other end, as in the text of `place_of`


def place_of(peer: str) -> Place | None:
    """(host, port) from gRPC's text for a caller; None if it has no port.

    Such a text is ipv4:10.0.0.1:51000 or ipv6:%5B::1%5D:51000.
    """
    _, _, text = (
        peer.replace("%5B", "").replace("%5D", "").replace("[", "").replace("]", "").partition(":")
    )
    host, _, port = text.rpartition(":")
    return (_plain(host), int(port)) if port.isdecimal() else None


class Doorman:
    """Remembers since when each stranger is connected.

    It shuts down the oldest connections when there are more than ``room`` strangers.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._members: set[Place] = set()
        self._since: dict[Place, int] = {}  # in the order in which they were first seen
        self._looks = 0

    @contextlib.contextmanager
    def let_in(self, peer: str) -> Iterator[None]:
        """Within this context, the caller that gRPC names ``peer`` counts as a member."""
        place = place_of(peer)
        if place is not None:
            self._members.add(place)
        try:
            yield
        finally:
            self._members -= {place}

    def look(self, port: int) -> int:
        """Check once the connections at ``port``; returns how many were shut down."""
        try:
            files = [int(name) for name in os.listdir(OPEN_FILES) if name.isdecimal()]
        except OSError:  # another system: what gRPC itself bounds must do
            return 0
        self._looks += 1
        if len(files) <= self.room:  # no more strangers than files
            self._since.clear()
            return 0
        strangers = {
            place: file
            for file in files
            if (place := _caller(file, port)) is not None and place not in self._members
        }
        self._since = {place: self._since.get(place, self._looks) for place in strangers}
        oldest = sorted(strangers, key=lambda place: self._since[place])[
            : max(0, len(strangers) - self.room)
        ]
        return sum(_hung_up(strangers[place], place) for place in oldest)


def _caller(file: int, port: int) -> Place | None:
    """The other end of this open file, if it is a connection accepted at ``port``; else None."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(file).st_mode):
            with socket.socket(fileno=os.dup(file)) as copy:
                if (
                    copy.family in (socket.AF_INET, socket.AF_INET6)
                    and copy.getsockname()[1] == port
                ):
                    host, other = copy.getpeername()[:2]
                    return _plain(host), other
    return None


def _hung_up(file: int, place: Place) -> bool:
    """Shut the connection down; gRPC then finds it ended. Returns whether it was shut down.

    It is left alone if the file number now belongs to another connection.
    """
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(file)) as copy:
        host, port = copy.getpeername()[:2]
        if (_plain(host), port) == place:
            copy.shutdown(socket.SHUT_RDWR)
            return True
    return False


def _plain(host: str) -> str:
    """The address without the prefix that IPv6 sockets put before an IPv4 address."""
    return host.removeprefix("::ffff:")
