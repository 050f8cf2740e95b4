"""What one run of a log did: its events added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dlora.config.arms import Arm, arm_of
from dlora.events.activity import Activity
from dlora.events.kinds import as_event
from dlora.events.log import LogLine


@dataclass(kw_only=True)
class RunRecord:
    """What one run did, from the log; the summary's figures, where there is one, are the same and
    come first.
    """

    name: str
    rounds: int = 0
    rounds_done: int = 0
    local_steps: list[int] = field(default_factory=list)  # of each participant in a round
    done: bool = False
    scores: dict[int, LogLine] = field(default_factory=dict)  # rounds_done -> the last scores event
    by_round: dict[int, LogLine] = field(default_factory=dict)  # round -> its event
    latest: LogLine = field(default_factory=dict)  # each field of these events as it was last said
    activity: Activity = field(default_factory=Activity)
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arm(self) -> Arm:
        """What it is in the comparison."""
        return arm_of(self.name)

    def figure(self, event: Mapping[str, Any], key: str) -> float | None:
        """The figure that counts: the average's; for peers that never talk, the mean of their
        own.
        """
        return (event.get(self.arm.counts) or {}).get(key)

    def last(self, of: str, default: Any = None) -> Any:
        """A field as the summary has it, else the last one logged that is not null."""
        if self.summary.get(of) is not None:
            return self.summary[of]
        return self.latest.get(of, default)


def run_records(
    lines: Iterable[LogLine], start: LogLine, summary: Mapping[str, Any]
) -> list[RunRecord]:
    """The lines of a log, sorted by run, in the order of the start event.

    ``summary``: summary.json; {} while the run is unfinished.
    """
    runs = {
        name: RunRecord(name=name, summary=summary.get("runs", {}).get(name, {}))
        for name in start["runs"]
    }
    for line in lines:
        run = runs.get(line.get("run", ""))
        if run is None:
            continue
        event, said = (
            as_event(line),
            {key: value for key, value in line.items() if value is not None},
        )
        match event["event"]:
            case "run":
                run.rounds = event["rounds"]
                run.local_steps = event.get("local_steps", run.local_steps)
            case "round":
                run.latest |= said
                run.by_round[event["round"]] = line
                run.rounds_done = event["round"] + 1
            case "scores":
                run.latest |= said
                # Peers' own scores may come in an event of their own after the average's: keep both
                run.scores[event["rounds_done"]] = run.scores.get(event["rounds_done"], {}) | said
            case "run-done":
                run.done = True
            case _:
                run.activity.hear(event)
    return list(runs.values())
