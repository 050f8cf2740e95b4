"""What all events have in common, and the events that runs and clouds share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal, NotRequired, TypedDict, TypeVar, cast


class Timed(TypedDict):
    """An event."""

    time: NotRequired[str]  # ISO 8601 with a zone; set where the event is told to the listeners


Told = TypeVar("Told", bound=Timed)


def now() -> str:
    """The time of an event: UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def with_time(event: Told) -> Told:
    """The event as it is told: its time comes after its kind."""
    fields = dict(event)
    return cast(Told, {"event": fields.pop("event"), "time": now(), **fields})


class Loading(Timed):
    """A tick before there is a log: what is being loaded."""

    event: Literal["loading"]
    text: str


class Certificate(Timed):
    """The network found that a certificate ends soon, has ended or is not valid yet."""

    event: Literal["certificate"]
    reason: str


class ConnectionRefused(Timed):
    """The network refused a connection, or was refused."""

    event: Literal["connection-refused"]
    reason: str
