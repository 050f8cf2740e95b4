"""The address on which a program accepts links, checked early; what is told of its links."""

from __future__ import annotations

import errno
import socket
import warnings
from collections.abc import Callable

from dlora.errors import ConfigError
from dlora.events.log import RunLog
from dlora.events.timed import Certificate, ConnectionRefused


def listen_address(listen: str | None, address: str | None) -> str | None:
    """``listen`` if given, else all interfaces at the port of the member's ``address``.

    None if neither is given.
    """
    if listen is None and address is not None:
        return f"[::]:{address.rpartition(':')[2]}"
    return listen


def check_listen(listen: str, option: str = "--listen") -> tuple[str, int]:
    """(host, port) of ``listen``. Raises ConfigError when this program cannot listen there.

    Call it before a run folder is made, so that the user has none to remove after the error.
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
                # as gRPC does; else a connection closed a moment ago would block the port
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
    """A function for `GrpcNetwork`'s ``on_certificate``: it writes to the log and the terminal."""

    def tell(reason: str) -> None:
        log.emit(Certificate(event="certificate", reason=reason))
        warnings.warn(reason, stacklevel=2)

    return tell


def refusal_teller(log: RunLog) -> Callable[[str], None]:
    """A function for `GrpcNetwork`'s ``on_refused``: it writes to the log.

    Where this program dialled, it warns too: the other end is a configured neighbour and no
    stranger.
    """

    def tell(reason: str) -> None:
        log.emit(ConnectionRefused(event="connection-refused", reason=reason))
        if reason.startswith("dialling "):
            warnings.warn(reason, stacklevel=2)

    return tell
