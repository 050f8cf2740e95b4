"""The run's events as progress bars on a terminal, and as a line a minute where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from types import TracebackType

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dlora.config.arms import DEC_LORA, arm_of
from dlora.events.activity import Activity
from dlora.events.kinds import Event, RoundDone, RoundScored
from dlora.events.neighbours import FINISHED
from dlora.show.words import NBSP, bytes_text, score_text, seconds_text

STARTING = "starting: torch and transformers take some seconds to load"
LINES_EVERY_S = 60.0


class Progress:
    """A listener of `RunLog`: a line for what is being prepared, a bar for each run, one below it
    while it is scored.

    Draws on standard error. Where that is no terminal, it prints a line when something else begins,
    and how far the run is once a minute, for the logs of services and clusters; with ``quiet``
    none. Each line begins with the time of day. A context manager that says at once that something
    is going on; the runs' bars stay after it.

    Its attributes are what one screen shows, which any event may change.
    """

    def __init__(
        self,
        console: Console | None = None,
        quiet: bool = False,
        lines_every_s: float = LINES_EVERY_S,
    ) -> None:
        console = console or Console(stderr=True)
        self._prints = not console.is_terminal and not quiet
        self._lines_every_s, self._printed_at, self._text = lines_every_s, time.monotonic(), ""
        self._bars = _Bars(
            bars.SpinnerColumn(finished_text="[green]✓"),
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.TextColumn("{task.fields[done]}", markup=False),
            bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._runs: dict[str, bars.TaskID] = {}
        # run -> loss, score, units, bytes: what stands behind its bar
        self._notes: dict[str, dict[str, str]] = {}
        self._rounds: dict[str, int] = {}
        self._done: dict[str, int] = {}  # rounds
        self._activities: dict[str, Activity] = {}  # of runs with a schedule
        self._local_steps: dict[str, list[int]] = {}
        # of a real peer: here, away, finished or refused
        self._neighbours: dict[str, str] = {}
        # the last score, and how many rounds were done then
        self._scored: dict[str, tuple[int, str]] = {}
        self._metric = "loss"
        # the phase or the scoring that shows now and then goes
        self._passing: bars.TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Hear one event or tick; unknown ones change nothing."""
        self._show(event)
        if not self._prints:
            return
        match event["event"]:
            case "loading" | "phase":
                self._print(event["text"])
            case "run" | "resumed" | "run-done":
                self._print_run(event["run"])
            case "step" | "round" | "evaluating" | "scores" if (
                time.monotonic() - self._printed_at >= self._lines_every_s
            ):
                self._print_run(event["run"])

    def say(self, text: str) -> None:
        """Print a line of its own, above the bars where there are any."""
        self._bars.console.print(
            Text(f"\n{text}" if self._bars.console.is_terminal else text), soft_wrap=True
        )

    def close(self) -> None:
        """Leave the bars of the runs as they are and write nothing more."""
        self._forget()
        self._bars.stop()

    def _show(self, event: Event) -> None:
        match event["event"]:
            case "start":
                self._metric = event["metric"]
            case "loading" | "phase":
                self._pass(event["text"], 0, None)
            case "evaluating":
                self._pass(f"  scoring {event['what']}", event["done"], event["total"])
            case "run":
                self._forget()
                self._rounds[event["run"]], self._local_steps[event["run"]] = (
                    event["rounds"],
                    event["local_steps"],
                )
                self._bar(event["run"])
                self._show_rounds(event["run"], 0)
            case "resumed":
                self._show_rounds(event["run"], event["rounds_done"])
            case "step":
                self._forget()
                self._bars.update(
                    self._bar(event["run"]), completed=event["done"], total=event["total"]
                )
                self._show_active(event["run"], event["done"])
            case "units" | "active":
                self._activities.setdefault(event["run"], Activity()).hear(event)
            case "round":
                self._show_rounds(event["run"], event["round"] + 1)
                sent = (
                    {"sent": bytes_text(event["bytes_on_wire"])} if event["bytes_on_wire"] else {}
                )
                self._note(
                    event["run"],
                    loss=f"loss {score_text(event['loss'], 'loss')}",
                    **sent,
                    **_with_cloud(event),
                )
                if (scored := self._scored.get(event["run"])) and scored[0] <= event["round"]:
                    when = f"after round {scored[0]}" if scored[0] else "before training"
                    self._note(event["run"], score=f"{scored[1]} {when}")
            case "scores":
                self._forget()
                self._note(event["run"], **_with_cloud(event))
                scores = event[arm_of(event["run"]).counts] or {}
                if scores.get(self._metric) is not None:
                    name = "scored loss" if self._metric == "loss" else self._metric
                    text = f"{name} {score_text(scores[self._metric], self._metric)}"
                    self._scored[event["run"]] = event["rounds_done"], text
                    self._note(event["run"], score=text)
            case "run-done":
                self._forget()
                bar = self._bar(event["run"])
                total = next(task.total for task in self._bars.tasks if task.id == bar)
                self._bars.update(bar, total=total or 1, completed=total or 1)
            case "linked" | "unlinked" | "refused" as what:
                self._neighbours[event["neighbour"]] = {
                    "linked": "here",
                    "unlinked": "finished" if event.get("reason") == FINISHED else "away",
                    "refused": "refused",
                }[what]
                here = ", ".join(
                    f"{name} {state}" for name, state in sorted(self._neighbours.items())
                )
                self._note(DEC_LORA.name, neighbours=here)
            case "done":
                self._forget()

    def __enter__(self) -> Progress:
        self._pass(STARTING, 0, None)
        self._bars.start()
        if self._prints:
            self._print(STARTING)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if kind is None and self._prints and self._runs:  # the last phase in a log is over too
            self._print("finished")

    def _bar(self, run: str) -> bars.TaskID:
        """The run's bar, made when the run is first heard of (a resumed one may start in the
        middle).
        """
        if run not in self._runs:
            self._runs[run] = self._bars.add_task(arm_of(run).title, total=None, done="", note="")
        return self._runs[run]

    def _show_rounds(self, run: str, rounds_done: int) -> None:
        self._done[run] = rounds_done
        total = f"/{self._rounds[run]}" if run in self._rounds else ""
        self._bars.update(self._bar(run), done=f"{rounds_done}{total} rounds")

    def _show_active(self, run: str, done: int) -> None:
        """Show how many units are active at the first participant; ``done``: local steps of all
        participants, which go at one pace.
        """
        activity = self._activities.get(run)
        if activity is not None and activity.first is not None and run in self._local_steps:
            steps = done * self._local_steps[run][0] // sum(self._local_steps[run])
            active = activity.changes[activity.first][-1][1]
            traffic, flops = (
                f"{100 * (1 - part):.0f}{NBSP}%"
                for part in activity.fractions(activity.first, steps)
            )
            saved = f"saved {traffic} of adapter traffic, {flops} of device FLOPs"
            self._note(run, active=f"{len(active)} of {len(activity.costs)} units, {saved}")

    def _note(self, run: str, **news: str) -> None:
        notes = self._notes.setdefault(run, {})
        notes.update(news)
        kinds = ("loss", "score", "active", "sent", "cloud", "neighbours")
        self._bars.update(
            self._bar(run), note=", ".join(notes[kind] for kind in kinds if kind in notes)
        )

    def _print_run(self, run: str) -> None:
        """How far a run is: what its bar shows."""
        bar = self._bar(run)
        tasks = {task.id: task for task in self._bars.tasks}
        task, passing = tasks[bar], tasks.get(self._passing) if self._passing is not None else None
        said = [f"{task.description} {task.fields['done']}", task.fields["note"]]
        if passing is not None and passing.total:
            said.append(
                f"{passing.description.strip()}, {passing.completed:,.0f} of {passing.total:,.0f}"
            )
        elif task.time_remaining and not task.finished:
            said.append(f"{seconds_text(task.time_remaining)} left")
        self._print(", ".join(filter(None, said)))

    def _print(self, text: str) -> None:
        if text != self._text:
            self._text, self._printed_at = text, time.monotonic()
            self._bars.console.print(Text(f"{datetime.now():%H:%M:%S} {text}"), soft_wrap=True)

    def _pass(self, text: str, done: int, total: int | None) -> None:
        if self._passing is None:
            self._passing = self._bars.add_task(text, total=total, done="", note="")
        self._bars.update(self._passing, description=text, completed=done, total=total)

    def _forget(self) -> None:
        if self._passing is not None:
            self._bars.remove_task(self._passing)
            self._passing = None


def _with_cloud(event: RoundDone | RoundScored) -> dict[str, str]:
    """The bytes with the cloud, of a run that has one: scoring adds to them too."""
    return (
        {"cloud": f"{bytes_text(event['cloud_bytes'])} with the cloud"}
        if "cloud_bytes" in event
        else {}
    )


class _Bars(bars.Progress):
    """Bars whose notes stand behind them while all have room there, and else below, each after its
    bar's name.
    """

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws."""
        tasks = self.tasks
        if not tasks:  # also while rich is still making this object
            return
        table, notes = (
            self.make_tasks_table(tasks),
            [Text(task.fields["note"], style="dim") for task in tasks],
        )
        width = Measurement.get(self.console, self.console.options, table).maximum
        if width + 1 + max((len(note) for note in notes), default=0) <= self.console.width:
            row = Table.grid(padding=(0, 1))
            row.add_row(table, Text("\n").join(notes))
            yield row
            return
        yield table
        for task, note in zip(tasks, notes, strict=True):
            if note:
                yield Text(f"{task.description}: ", style="dim").append_text(note)
