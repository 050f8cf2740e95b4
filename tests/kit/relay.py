"""A relay between device and cloud that counts bytes, and can hold or cut them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


class Relay:
    """A line between the devices and the cloud, on which a given number of bytes can be waited
    for.
    """

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.passed = 0  # bytes, both ways
        self._target, self._at = "", -1
        self._act: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._server.close()

    def to(self, address: str) -> None:
        self._target = address

    def at(self, passed: int, act: Callable[[], None]) -> None:
        """When that many bytes have passed, ``act`` before the next ones do."""
        self._act, self._at = act, passed

    @property
    def has_acted(self) -> bool:
        return self._at < 0

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(
                    target=self._join, args=self._server.accept()[:1], daemon=True
                ).start()

    def _join(self, near: socket.socket) -> None:
        host, port = self._target.split(":")
        with near, contextlib.suppress(OSError), socket.create_connection((host, int(port))) as far:
            ways = [
                threading.Thread(target=self._carry, args=ends, daemon=True)
                for ends in ((near, far), (far, near))
            ]
            for way in ways:
                way.start()
            for way in ways:
                way.join()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    self.passed += len(data)
                    if 0 <= self._at <= self.passed:
                        self._act()
                        self._at = -1
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
