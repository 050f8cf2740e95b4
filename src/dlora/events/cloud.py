"""What a cloud did for whom: its events, added up by device."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from dlora.events.serving import CloudEvent, Serving

NUM_NEWS = 3


@dataclass
class Served:
    """One device, over all its links.

    Its attributes are the columns of the table of devices.
    """

    since: str | None = None  # of the link that is up, ISO 8601 with a zone
    links: int = 0
    wire: str | None = None
    parts_here: int = 0  # in the cloud now
    tokens_here: int = 0
    tokens: int = 0  # that went through the body, forward
    parts: int = 0
    steps: int = 0  # parts whose backward is done
    step_s: float = 0.0  # all of them together, the device's answers included
    waited_s: float = 0.0  # of all parts, for the device's answers
    sent_bytes: int = 0
    received_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # why -> parts

    def summary(self) -> dict[str, Any]:
        """What is told when the cloud stops."""
        names = (
            "links",
            "tokens",
            "parts",
            "steps",
            "step_s",
            "waited_s",
            "sent_bytes",
            "received_bytes",
        )
        return {**{name: getattr(self, name) for name in names}, "failures": dict(self.failures)}


class CloudRecord:
    """A listener of the cloud's events."""

    def __init__(self) -> None:
        self.devices: dict[str, Served] = {}
        self.serving: Serving | None = None  # the event
        self.refused_links = 0
        # time, one line: the last things that went wrong
        self.news: deque[tuple[str, str]] = deque(maxlen=NUM_NEWS)

    def __call__(self, event: CloudEvent) -> None:
        """Hear one event; unknown ones change nothing."""
        device = str(event.get("device", ""))
        served = self.devices.setdefault(device, Served()) if device else Served()
        match event["event"]:
            case "serving":
                self.serving = event
            case "linked":
                served.since, served.wire = event["time"], None
                served.links += 1
            case "opened":
                served.wire = event["wire"]
            case "part":
                served.tokens += event["tokens"]
                served.parts += 1
                served.waited_s += event["waited_s"]
                if event["keep"]:
                    served.steps += 1
                    served.step_s += event["seconds"]
            case "load":
                served.parts_here, served.tokens_here = event["parts"], event["tokens"]
                served.sent_bytes, served.received_bytes = (
                    event["sent_bytes"],
                    event["received_bytes"],
                )
            case "failed":
                served.failures[event["why"]] += 1
                self._note(event, f"{event['device']}: {event['why']}: {event['text']}")
            case "refused":
                self.refused_links += 1
                self._note(event, f"{event['device']} refused: {event['reason']}")
            case "connection-refused":
                self.refused_links += 1
                self._note(event, event["reason"])
            case "certificate":
                self._note(event, event["reason"])
            case "closed":
                served.since = None
                served.parts_here = served.tokens_here = 0

    def _note(self, event: CloudEvent, text: str) -> None:
        self.news.append((event["time"], text))
