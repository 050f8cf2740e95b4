"""The events of a cloud: each is made as one of these types, with these fields, and read as it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from dlora.events.timed import Certificate, ConnectionRefused, Loading, Timed


class Serving(Timed):
    """The cloud listens."""

    event: Literal["serving"]
    listen: str
    model: str
    federation: str
    metrics: str | None  # HOST:PORT


class OfDevice(Timed):
    """Something that one device caused."""

    device: str


class DeviceLinked(OfDevice):
    """A link with a device is up."""

    event: Literal["linked"]


class DeviceRefused(OfDevice):
    """A device may not go on."""

    event: Literal["refused"]
    reason: str


class DeviceOpened(OfDevice):
    """The cloud and a device agree on a run."""

    event: Literal["opened"]
    wire: Literal["float32", "bfloat16", "int8"]
    groups: int


class PartDone(OfDevice):
    """A part has gone through the cloud."""

    event: Literal["part"]
    tokens: int
    keep: bool  # whether its backward ran too
    waited_s: float  # for the device's answers
    seconds: float  # all together


class PartFailed(OfDevice):
    """A part was given up."""

    event: Literal["failed"]
    why: str
    text: str


class Load(OfDevice):
    """What a device has in the cloud now, and its bytes so far, over all links."""

    event: Literal["load"]
    parts: int
    tokens: int
    sent_bytes: int
    received_bytes: int


class DeviceClosed(OfDevice):
    """A link with a device has ended."""

    event: Literal["closed"]


DeviceEvent = (
    DeviceLinked | DeviceRefused | DeviceOpened | PartDone | PartFailed | Load | DeviceClosed
)
CloudEvent = Loading | Certificate | ConnectionRefused | Serving | DeviceEvent
CloudListener = Callable[[CloudEvent], None]
