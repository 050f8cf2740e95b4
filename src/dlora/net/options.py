"""What gRPC is told about connections, and how long it may take: against strangers, silence and
floods.
"""

from __future__ import annotations

import os
from typing import Any

# Before gRPC is imported: else every stranger that is turned away prints a line here.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

MIN_PAUSE_S, MAX_PAUSE_S = 0.2, 10.0  # between two attempts to dial; doubled each time
DIAL_S = 20.0  # for name lookup, TCP, TLS and the other end's consent
COURTESY_S = 1.0  # a call waits for our own attempt to dial the caller
FIRST_FRAME_S = 20.0  # a link that stays silent from the start is ended
FLUSH_S = 1.0  # for the last frames to leave when a conversation ends
# for what gRPC still has to report of cancelled calls: it must not find the event loop closed
SETTLE_S = 0.03
RELOAD_S = 1.0  # between two looks at the federation file
# from outside, strangers' included: file descriptors must remain for the run's own files
MAX_CONNECTIONS = 256
# of them, that are nobody's link; with more, those that are held longest are hung up
MAX_STRANGERS = 128
DOOR_S = 0.25  # between two looks at who is at the door
LINKS_AT_ONCE, LINKS_PER_S = 30, 1.0  # of one member that dials in; more of them wait
QUEUE_S = 4.0  # for that long at most
HANG_UPS = 3  # on end, until it is said that the other end hangs up in the handshake
# frames below cost time and carry nothing: so many a second are read of a member
FEW_BYTES = 1 << 12

_BOTH_ENDS = [
    ("grpc.max_metadata_size", 8192),
    # a machine that vanished without a word is noticed within 30 s
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # else a minute, whatever the line before says (1.85.1)
    # What may be under way on a link, and what a neighbour can make us hold for a conversation that
    # does not read. gRPC's own choice grows beyond 16 MiB on a fast link. With this one, 160 Mbit/s
    # go over a link of 200 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),
    # Of one read. Without it a flood that never pauses doubles it again and again: 250 MiB were
    # held (grpc/grpc#42194).
    ("grpc.experimental.tcp_max_read_buffer_size", 4 << 20),
]
_LISTENER = [
    *_BOTH_ENDS,
    ("grpc.so_reuseport", 0),  # else two processes share a port and each gets half of the links
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_concurrent_streams", 1),  # a connection is a link
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 20_000),  # without a stream
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # the dialler's keepalive is no flood
]
_DIALLER = [
    *_BOTH_ENDS,
    ("grpc.use_local_subchannel_pool", 1),  # an attempt knows nothing of the failures before it
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),  # no settings out of the DNS
    # http_proxy and https_proxy are meant for fetching web pages, and must not carry a run's
    # traffic by surprise. grpc_proxy is meant for this, and gRPC reads it before the other two; TLS
    # stays end to end.
    ("grpc.enable_http_proxy", int("grpc_proxy" in os.environ)),
]


def listener_options(max_frame_bytes: int) -> list[tuple[str, Any]]:
    """Options of a server that takes frames up to this length; a longer one is refused by its
    announced length.
    """
    return [*_LISTENER, ("grpc.max_receive_message_length", max_frame_bytes)]


def dialler_options(max_frame_bytes: int, name: str) -> list[tuple[str, Any]]:
    """Options of a connection with one member, whose certificates say ``name`` at every address."""
    return [
        *_DIALLER,
        ("grpc.max_receive_message_length", max_frame_bytes),
        ("grpc.ssl_target_name_override", name),
    ]
