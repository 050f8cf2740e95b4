"""Where a program accepts links, checked before all else; what it says of certificates
meanwhile.
"""

from __future__ import annotations

import errno
import socket
import warnings
from collections.abc import Callable

from dlora.errors import ConfigError
from dlora.events.log import RunLog


def listen_address(listen: str | None, address: str | None) -> str | None:
    """``listen``, else all interfaces at the port of the member's ``address``; None where there is
    neither.
    """
    if listen is None and address is not None:
        return f"[::]:{address.rpartition(':')[2]}"
    return listen


def check_listen(listen: str, option: str = "--listen") -> tuple[str, int]:
    """Host and port. Raises ConfigError when nobody can listen there: later there would be a run
    folder to remove.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            f"{option} {listen}: expected HOST:PORT, such as 0.0.0.0:7000 or [::]:7000"
        )
    host = host.strip("[]")
    try:
        places = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(
            f"{option} {listen}: {host} is no address of this machine ({error.strerror})"
        ) from error
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # as gRPC: a closed link is in nobody's way
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                continue  # a machine without IPv6; gRPC then takes the IPv4 wildcard
            what = "another program does" if error.errno == errno.EADDRINUSE else error.strerror
            raise ConfigError(
                f"cannot listen on {listen}: {what}; stop that program or give another HOST:PORT to"
                f" {option} (others still dial the address of the member file)"
            ) from None
    return host, int(port)


def certificate_teller(log: RunLog) -> Callable[[str], None]:
    """Says in the log and on the terminal what a network finds of certificates: one ends soon, is
    over or not valid yet.
    """

    def tell(reason: str) -> None:
        log.emit("certificate", reason=reason)
        warnings.warn(reason, stacklevel=2)

    return tell
