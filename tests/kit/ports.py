"""Ports of this machine on which a test can listen."""

from __future__ import annotations

import os
import socket


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those the system gives to whoever dials out."""
    found: list[int] = []
    port = 12_000 + os.getpid() * 37 % 18_000
    while len(found) < count:
        port += 1
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
    return found
