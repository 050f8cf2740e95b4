"""The cloud's devices as a table on a terminal: tokens, bytes, step times."""

from __future__ import annotations

from datetime import datetime
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from dlora.events.cloud import CloudRecord, Served
from dlora.events.serving import CloudEvent
from dlora.show.progress import STARTING
from dlora.show.words import NBSP, bytes_text, seconds_text

REFRESHES_A_SECOND = 4


class CloudView:
    """A listener of the cloud's events: a table of the devices that are linked, and what went wrong
    last.

    Draws on standard error. Where that is no terminal, a line says that the cloud serves, who comes
    and goes, and what went wrong, for the log of a service; with ``quiet`` none does. A context
    manager.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._record = CloudRecord()
        self._waiting: Spinner | None = Spinner("dots", Text(STARTING))
        self._live = Live(
            get_renderable=self._drawn,
            console=self._console,
            refresh_per_second=REFRESHES_A_SECOND,
            transient=True,
        )

    def __call__(self, event: CloudEvent) -> None:
        """Hear one event; unknown ones change nothing."""
        self._record(event)
        if event["event"] == "loading":
            self._waiting = Spinner("dots", Text(event["text"]))
        if event["event"] == "serving":
            self._waiting = None
        text = _said(event)
        if (
            text is not None
            and not self._quiet
            and (event["event"] == "serving" or not self._console.is_terminal)
        ):
            self._console.print(Text(text), soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line of its own, above the table where there is one."""
        self._console.print(
            Text(f"\n{text}" if self._console.is_terminal else text), soft_wrap=True
        )

    def close(self) -> None:
        """Remove the table from the terminal."""
        self._live.stop()

    def __enter__(self) -> CloudView:
        if self._console.is_terminal:
            self._live.start(refresh=True)
        elif not self._quiet:
            self._console.print(Text(f"{datetime.now():%H:%M:%S} {STARTING}"), soft_wrap=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _drawn(self) -> Group:
        if self._waiting is not None:
            return Group(self._waiting)
        table = Table(
            "device", "here since", "wire", "tokens", "down", "up", "a step", "now", box=None
        )
        for name, served in sorted(self._record.devices.copy().items()):
            if served.since is not None:
                table.add_row(*map(Text, (name, *_cells(served))))
        news = [Text(f"{_clock(time)} {text}", style="dim") for time, text in [*self._record.news]]
        return Group(
            *([table] if table.row_count else [Text("no device is here", style="dim")]), *news
        )


def _said(event: CloudEvent) -> str | None:
    """The event as a line, if people should read it."""
    match event["event"]:
        case "serving":
            metrics = f"; metrics on {event['metrics']}" if event["metrics"] else ""
            place, devices = event["listen"], event["federation"]
            return (
                f"serving {event['model']} on {place} for devices of {devices}{metrics}; Ctrl-C"
                " stops"
            )
        case "linked" | "closed" as what:
            return f"{event['device']} {'is here' if what == 'linked' else 'has gone'}"
        case "refused":
            return f"{event['device']} refused: {event['reason']}"
        case "failed":
            return f"{event['device']}: a part failed ({event['why']}): {event['text']}"
        case "certificate":
            return f"warning: {event['reason']}"
        case "connection-refused":
            return f"connection refused: {event['reason']}"
    return None


def _cells(served: Served) -> tuple[str, ...]:
    return (
        _clock(served.since or ""),
        served.wire or "–",
        f"{served.tokens:,}",
        bytes_text(served.sent_bytes),
        bytes_text(served.received_bytes),
        _mean(served.step_s / served.steps) if served.steps else "–",
        (
            f"{served.parts_here} part{'s' if served.parts_here > 1 else ''}"
            if served.parts_here
            else "idle"
        ),
    )


def _mean(seconds: float) -> str:
    return seconds_text(seconds) if seconds >= 1 else f"{1000 * seconds:.0f}{NBSP}ms"


def _clock(time: str) -> str:
    """Hours and minutes here, of an ISO time."""
    return f"{datetime.fromisoformat(time).astimezone():%H:%M}"
