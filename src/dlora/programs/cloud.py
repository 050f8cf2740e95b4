"""The cloud program: it runs the frozen model for many devices and keeps nothing of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from dlora.config.cloud import CloudConfig
from dlora.errors import IdentityError
from dlora.events.cloud import CloudRecord
from dlora.events.serving import (
    CloudEvent,
    CloudListener,
    DeviceClosed,
    DeviceEvent,
    DeviceLinked,
    DeviceRefused,
    Load,
    Serving,
)
from dlora.events.timed import Certificate, ConnectionRefused, Loading, with_time
from dlora.identity.federation import Federation, FederationFile
from dlora.identity.keys import Identity
from dlora.net.channel import Channel
from dlora.net.grpc import GrpcNetwork
from dlora.net.listen_address import check_listen, listen_address
from dlora.net.transport import Traffic
from dlora.show.cloud.metrics import CloudMetrics
from dlora.split.cloud.body import Body, load_body
from dlora.split.cloud.limits import Budget, Limits
from dlora.split.cloud.session import Session
from dlora.version import __version__
from dlora.wire.frame import Link
from dlora.wire.split.codec import MAX_FRAME_BYTES, MAX_HEAD_BYTES, split_kind
from dlora.wire.split.frames import Refused, SplitFrame

USABLE_MEMORY = 0.6  # fraction of the memory that is free after the model is loaded
LOOK_S = 0.25  # seconds between two looks at `stop` and at the parts of the devices

Summary = dict[str, Any]


def cloud(
    config: CloudConfig,
    *,
    name: str,
    key: str | Path,
    federation: str | Path,
    listen: str | None = None,
    listeners: Sequence[CloudListener] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Run the frozen model for the devices of the federation until ``stop()`` returns True.

    Returns what was done for each device. ``listen`` (HOST:PORT) is used instead of the config's;
    the default is all interfaces at the port of this member's address. Writes no file. Raises
    UserError if it cannot start.
    """
    listed = Federation.load(federation)
    member = listed.member(name)
    if member.role != "cloud" or member.address is None:
        what = f"a {member.role}" if member.role != "cloud" else "a cloud without an address"
        advice = "dlora identity new NAME --role cloud --address HOST:PORT"
        raise IdentityError(
            f"{name} is {what} in {listed.source}; a cloud that devices can dial is made with:"
            f" {advice}"
        )
    identity = Identity.load(name, key, listed)
    place = listen_address(listen or config.listen, member.address)
    assert place is not None  # a cloud always has an address
    check_listen(place)
    metrics = (
        None if config.metrics is None else CloudMetrics(*check_listen(config.metrics, "metrics"))
    )
    record = CloudRecord()
    telling = _Telling([record, *([metrics] if metrics else []), *listeners])
    telling.tell(Loading(event="loading", text=f"loading {config.model}"))
    body = load_body(config)
    limits = config.limits
    guests = _Guests(
        body,
        Limits(limits.max_tokens, limits.max_parts, limits.idle_s),
        Budget(limits.memory_bytes or _free_bytes(body), _parts_at_once(body)),
        limits.max_devices,
        telling,
    )
    network = GrpcNetwork(
        identity,
        FederationFile(federation),
        None,
        place,
        guests.kind.as_bytes,
        lambda reason: telling.tell(ConnectionRefused(event="connection-refused", reason=reason)),
        lambda reason: telling.tell(Certificate(event="certificate", reason=reason)),
    )
    telling.traffic = network.traffic
    began_at = time.monotonic()
    with metrics or contextlib.nullcontext():
        serving = Serving(
            event="serving",
            listen=place,
            model=config.model,
            federation=str(federation),
            metrics=f"{metrics.host}:{metrics.port}" if metrics else None,
        )
        asyncio.run(_serve(network, guests, stop, lambda: telling.tell(serving)))
    return {
        "version": __version__,
        "model": config.model,
        "cloud": name,
        "seconds": time.monotonic() - began_at,
        "refused_links": record.refused_links,
        "devices": {device: served.summary() for device, served in sorted(record.devices.items())},
    }


async def _serve(
    network: GrpcNetwork, guests: _Guests, stop: Callable[[], bool], begun: Callable[[], None]
) -> None:
    serving, bound = (
        asyncio.create_task(network.serve(guests.talk)),
        asyncio.create_task(network.bound.wait()),
    )
    try:
        await asyncio.wait({serving, bound}, return_when=asyncio.FIRST_COMPLETED)
        if network.bound.is_set():
            begun()
        while not (stop() or serving.done()):
            await asyncio.wait({serving}, timeout=LOOK_S)
            guests.look()
    finally:
        bound.cancel()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


class _Telling:
    """Passes events to the listeners, one at a time, from any thread."""

    def __init__(self, listeners: Sequence[CloudListener]) -> None:
        self.listeners, self.traffic = tuple(listeners), Traffic()
        self._lock = threading.Lock()

    def tell(self, event: CloudEvent) -> None:
        """Give the event to every listener."""
        with self._lock:
            timed = with_time(event)
            for listener in self.listeners:
                listener(timed)

    def tell_load(self, device: str, parts: int, tokens: int) -> None:
        """Tell what a device holds in the cloud's memory, and its bytes so far over all links."""
        sent, received = (
            ways.get(device, 0) for ways in (self.traffic.sent_bytes, self.traffic.received_bytes)
        )
        self.tell(
            Load(
                event="load",
                device=device,
                parts=parts,
                tokens=tokens,
                sent_bytes=sent,
                received_bytes=received,
            )
        )


class _Guests:
    """The devices that are linked now, each with its session."""

    def __init__(
        self, body: Body, limits: Limits, budget: Budget, max_devices: int, telling: _Telling
    ) -> None:
        self.body, self.limits, self.budget, self.max_devices, self.telling = (
            body,
            limits,
            budget,
            max_devices,
            telling,
        )
        self._sessions: dict[str, Session] = {}
        widest = max(
            body.facts["embedding_width"],
            *(max(unit.width, unit.in_features) for unit in body.units),
        )
        self.kind = split_kind(
            max_bytes=min(MAX_FRAME_BYTES, 4 * limits.max_tokens * widest + MAX_HEAD_BYTES)
        )

    def look(self) -> None:
        """Tell of every device what it holds here."""
        for device, session in self._sessions.items():
            self.telling.tell_load(device, session.num_parts, session.num_tokens)

    def _evict(self, greedy: set[str]) -> None:
        """End parts of the devices ``greedy``.

        A part that waits for its share of the memory calls this from its own thread.
        """
        for name in greedy:
            session = self._sessions.get(name)
            if session is not None:
                session.evict()

    async def talk(self, device: str, link: Link) -> None:
        """Serve one link with one device until it ends; then its parts are ended too."""
        channel = Channel(link, self.kind)

        def send(frame: SplitFrame) -> None:
            # a device that reads nothing must not keep its parts here
            channel.send(frame, self.limits.idle_s)
            if isinstance(frame, Refused):
                channel.close()

        def tell(event: DeviceEvent) -> None:
            if event["event"] == "opened":
                channel.kind = split_kind(event["wire"], self.kind.max_bytes)
            self.telling.tell(event)

        if len(self._sessions) >= self.max_devices:
            reason = (
                f"{self.max_devices} devices are here, and limits.max_devices is that; this one"
                " waits for a place"
            )
            tell(DeviceRefused(event="refused", device=device, reason=reason))
            await channel.carry(
                lambda _: None if channel.is_down else send(Refused(reason, later=True))
            )
            return
        session = self._sessions[device] = Session(
            device, self.body, self.limits, self.budget, send, tell
        )
        session.evict_others = self._evict
        tell(DeviceLinked(event="linked", device=device))
        try:
            await channel.carry(session.hear)
        finally:
            session.close()
            del self._sessions[device]
            self.telling.tell_load(device, 0, 0)
            tell(DeviceClosed(event="closed", device=device))


def _free_bytes(body: Body) -> int:
    """The bytes that may be used of the memory that is free now on the model's devices."""
    places = {weight.device for weight in body.network.parameters()}
    free_bytes = sum(torch.cuda.mem_get_info(place)[0] for place in places if place.type == "cuda")
    return int(USABLE_MEMORY * (free_bytes or psutil.virtual_memory().available))


def _parts_at_once(body: Body) -> int:
    """How many parts compute at once.

    On CPUs: the number of cores divided by torch's threads, because each part uses them all. A GPU
    computes one part at a time.
    """
    return (
        max(1, (psutil.cpu_count() or 1) // torch.get_num_threads())
        if body.device.type == "cpu"
        else 1
    )
