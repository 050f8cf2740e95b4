"""The cloud's events as Prometheus text over HTTP."""

from __future__ import annotations

import socket
import threading
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    make_wsgi_app,
)

from dlora.events.serving import CloudEvent

STEP_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
MAX_READERS = 16  # connections at once; one more is closed: files must remain for devices
READER_S = 5.0  # that a reader may keep silent


class _Reader(WSGIRequestHandler):
    timeout = READER_S

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the terminal belongs to the cloud's own messages."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each of a few readers."""

    daemon_threads = True
    _room: threading.Semaphore

    def process_request(self, request: Any, client_address: Any) -> None:
        """Let a reader in where there is room."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One reader, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()


class CloudMetrics:
    """A listener of the cloud's events; serves what it heard on ``host``:``port`` while it is
    entered, port 0: any free one.

    Its attributes are the metrics, one each.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each of ours, of no use here
        self.registry = registry = CollectorRegistry()
        device = ["device"]
        self._linked = Gauge(
            "dlora_devices_linked", "Devices that are linked now", registry=registry
        )
        self._parts = Gauge(
            "dlora_parts_in_flight", "Micro-batches in the cloud now", device, registry=registry
        )
        self._tokens_here = Gauge(
            "dlora_tokens_in_flight", "Tokens in the cloud now", device, registry=registry
        )
        self._tokens = Counter(
            "dlora_tokens", "Tokens that went through the body", device, registry=registry
        )
        self._steps = Counter(
            "dlora_steps", "Micro-batches whose backward is done", device, registry=registry
        )
        self._sent = Counter(
            "dlora_sent_bytes", "Serialised frames, down", device, registry=registry
        )
        self._received = Counter(
            "dlora_received_bytes", "Serialised frames, up", device, registry=registry
        )
        self._waited = Counter(
            "dlora_waited_seconds",
            "Time of micro-batches for the device's answers",
            device,
            registry=registry,
        )
        self._failures = Counter(
            "dlora_failures", "Micro-batches given up", [*device, "why"], registry=registry
        )
        self._refused = Counter(
            "dlora_refused_links", "Links refused or ended for what was sent", registry=registry
        )
        self._step_s = Histogram(
            "dlora_step_seconds",
            "A micro-batch, there and back",
            registry=registry,
            buckets=STEP_BUCKETS_S,
        )
        self._so_far: dict[tuple[str, str], int] = {}  # (device, way) -> bytes counted

    def __call__(self, event: CloudEvent) -> None:
        """Hear one event; unknown ones change nothing."""
        device = str(event.get("device", ""))
        match event["event"]:
            case "linked":
                self._linked.inc()
            case "closed":
                self._linked.dec()
                self._parts.labels(device).set(0)
                self._tokens_here.labels(device).set(0)
            case "load":
                self._parts.labels(device).set(event["parts"])
                self._tokens_here.labels(device).set(event["tokens"])
                for way, so_far, counter in (
                    ("sent", event["sent_bytes"], self._sent),
                    ("received", event["received_bytes"], self._received),
                ):
                    counter.labels(device).inc(so_far - self._so_far.get((device, way), 0))
                    self._so_far[device, way] = so_far
            case "part":
                self._tokens.labels(device).inc(event["tokens"])
                self._waited.labels(device).inc(event["waited_s"])
                if event["keep"]:
                    self._steps.labels(device).inc()
                    self._step_s.observe(event["seconds"])
            case "failed":
                self._failures.labels(device, event["why"]).inc()
            case "refused" | "connection-refused":
                self._refused.inc()

    def __enter__(self) -> CloudMetrics:
        family, _, _, _, place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[
            0
        ]
        room = threading.Semaphore(MAX_READERS)
        server = type("Server", (_Server,), {"address_family": family, "_room": room})
        app = make_wsgi_app(self.registry)
        self._server: WSGIServer = make_server(str(place[0]), self.port, app, server, _Reader)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()
        self.port = self._server.server_port
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
