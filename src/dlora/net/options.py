"""gRPC's options and the time limits of links, against strangers, silence and floods."""

from __future__ import annotations

import os
from typing import Any

# Set before gRPC is imported; else gRPC prints a line for every stranger that it refuses.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

MIN_PAUSE_S, MAX_PAUSE_S = 0.2, 10.0  # between two attempts to dial; doubled each time
DIAL_S = 20.0  # for name lookup, TCP, TLS and the other end's answer
COURTESY_S = 1.0  # a caller waits so long while we dial it ourselves
FIRST_FRAME_S = 20.0  # a link that stays silent from the start is ended
FLUSH_S = 1.0  # for sending the last frames when a conversation ends
# Time for gRPC's last callbacks of cancelled calls, which need an open event loop.
SETTLE_S = 0.03
RELOAD_S = 1.0  # between two checks of the federation file
# Connections from outside, strangers included; file descriptors must remain for the run's files.
MAX_CONNECTIONS = 256
# Connections from outside that belong to no link; beyond that, the oldest are shut down.
MAX_STRANGERS = 128
DOOR_S = 0.25  # between two checks for strangers
LINKS_AT_ONCE, LINKS_PER_S = 30, 1.0  # links that one member may dial; further ones wait
QUEUE_S = 4.0  # the longest such wait; then the link is refused
HANG_UPS = 3  # handshakes in a row that the other end closes before that is reported
# Frames shorter than this are limited in number (`FrameKind.frames_per_s`), because each costs time
# and carries hardly any data.
FEW_BYTES = 1 << 12

_BOTH_ENDS = [
    ("grpc.max_metadata_size", 8192),
    # a machine that disappears without closing its connections is noticed within 30 s
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # else a minute, whatever the line before says (1.85.1)
    # The number of bytes that can be in flight on a link. A neighbour can make us hold so many for
    # a conversation that does not read. gRPC's default grows beyond 16 MiB on a fast link. This
    # value allows 160 Mbit/s over a link with a round trip of 200 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),
    # Limit for one read. Without it gRPC doubles the buffer again and again while data keep coming,
    # up to 250 MiB in our test (grpc/grpc#42194).
    ("grpc.experimental.tcp_max_read_buffer_size", 4 << 20),
]
_LISTENER = [
    *_BOTH_ENDS,
    ("grpc.so_reuseport", 0),  # else two processes share a port and each gets half of the links
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_concurrent_streams", 1),  # a connection has one link
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 20_000),  # without a stream
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # allows the dialler's keepalive
]
_DIALLER = [
    *_BOTH_ENDS,
    ("grpc.use_local_subchannel_pool", 1),  # an attempt does not wait because earlier ones failed
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),  # take no settings from the DNS
    # http_proxy and https_proxy are for web pages; a run's traffic must not go through them
    # unexpectedly. grpc_proxy is for gRPC, which reads it before the other two. TLS stays end to
    # end.
    ("grpc.enable_http_proxy", int("grpc_proxy" in os.environ)),
]


def listener_options(max_frame_bytes: int) -> list[tuple[str, Any]]:
    """Options of a server that accepts frames of at most ``max_frame_bytes``.

    gRPC refuses a longer frame because of its announced length.
    """
    return [*_LISTENER, ("grpc.max_receive_message_length", max_frame_bytes)]


def dialler_options(max_frame_bytes: int, name: str) -> list[tuple[str, Any]]:
    """Options of a connection to one member; its certificate must have the name ``name``."""
    return [
        *_DIALLER,
        ("grpc.max_receive_message_length", max_frame_bytes),
        ("grpc.ssl_target_name_override", name),
    ]
