"""What a run's page says in words, numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.config.arms import DEC_LORA, DLORA, FEDAVG, LOCAL, POOLED
from dlora.config.tasks import score_of
from dlora.decentralized.drawn import drawn_count
from dlora.events.log import LogLine
from dlora.events.record import RunRecord
from dlora.show.words import NBSP, bytes_text, percent_text, score_text, several_text

# colour and dashes
_LOOKS = {DEC_LORA: (0, 0), DLORA: (0, 0), POOLED: (1, 1), LOCAL: (7, 2), FEDAVG: (2, 3)}
MOST_LABELS = 8
_GRAPHS = {
    "complete": "on a complete graph",
    "erdos-renyi": "on a random graph",
    "exponential": "on an exponential graph",
    "edges": "on a graph of their own",
    "base-k": "on a base-k graph",
}


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The bytes of one wire, and how the page speaks of them."""

    of: str  # the field of events and summary
    column: str  # of the table of runs
    meaning: str  # of that column
    card: str
    axis: str  # without its unit
    caption: str


class Page:
    """What the template asks for, beside the pictures; all of it is escaped there."""

    def __init__(
        self,
        config: Mapping[str, Any],
        start: LogLine,
        runs: list[RunRecord],
        summary: Mapping[str, Any],
    ) -> None:
        self.config, self.start, self.runs, self.summary, self.finished = (
            config,
            start,
            runs,
            summary,
            bool(summary),
        )
        self.main = next((run for run in runs if run.arm is DEC_LORA), runs[0])
        self.names = [peer["name"] for peer in start["peers"]]
        self.split: Mapping[str, Any] = start.get("split") or {}
        # alone with its cloud: no peers, no graph
        self.device = self.names[0] if self.main.arm is DLORA else None
        self.one = self.alone and len(runs) == 1  # nobody to average or to compare with
        every = [event.get("consensus") or {} for run in runs for event in run.scores.values()]
        # Perplexity is the loss in words a reader knows; a task with options is judged by accuracy.
        told = start["metric"] == "loss" and any("perplexity" in scores for scores in every)
        self.key: str = "perplexity" if told else start["metric"]
        self.reading = score_of(self.key)

    @property
    def title(self) -> str:
        """Who trained, in a few words that a sentence can begin with."""
        if self.device is not None:
            return f"{self.device} with its frozen model in the cloud {self.split.get('cloud')}"
        if self.alone:
            return (
                "One participant with its frozen model in a cloud"
                if self.split
                else "One participant"
            )
        peers = f"{len(self.names)} peers {_GRAPHS.get(self.topology, f'on a {self.topology}')}"
        return f"{peers} with their frozen model in a cloud" if self.split else peers

    @property
    def alone(self) -> bool:
        """Whether nobody has a neighbour."""
        return len(self.names) == 1

    @property
    def topology(self) -> str:
        """The kind of graph, as configured."""
        return str(self.config.get("peers", {}).get("topology", {}).get("kind", "edges"))

    @property
    def others(self) -> list[RunRecord]:
        """The baselines."""
        return [run for run in self.runs if run is not self.main]

    @property
    def sentence(self) -> str:
        """The result in words."""
        reached = self.final(self.main)
        if reached is None:
            return f"{self.title} started; nothing is scored yet.{_drawn(self.start)}"
        under_way = not self.finished and self.main.rounds_done < self.main.rounds
        so_far = (
            f"So far, after {self.main.rounds_done} of {self.main.rounds} rounds: "
            if under_way
            else ""
        )
        figure = (
            f"{self.score(reached)} {self.reading.word}"
            if self.reading.is_fraction
            else f"a {self.reading.word} of {self.score(reached)}"
        )
        who = (
            self.title.replace("One participant", "one participant")
            if so_far and self.device is None
            else self.title
        )
        parts = [f"{so_far}{who} reached {figure}" + ("" if self.alone else " together")]
        averaged = self.main.summary.get("consensus_peers", len(self.names))
        if averaged < len(self.names):
            parts = [f"The average of {averaged} of the {who} reached {figure}"]
        for run in sorted(self.others, key=lambda run: run.arm is LOCAL):
            if (final := self.final(run)) is not None:
                parts.append(run.arm.result.format(self.score(final)))
        ended = "." if self.reading.higher_is_better else " (lower is better)."
        return "; ".join(parts) + ended + _drawn(self.start)

    @property
    def cards(self) -> list[tuple[str, str]]:
        """The few numbers to remember: (number, what it is)."""
        together = self.final(self.main)
        whose = "the adapter" if self.one else "the averaged adapter"
        cards = (
            [(self.score(together), f"{self.reading.word} of {whose}{self.judged}")]
            if together is not None
            else []
        )
        for arm in (LOCAL, POOLED):
            other = next((self.final(run) for run in self.others if run.arm is arm), None)
            if together is not None and other is not None:
                change = 100 * (together - other) if self.reading.is_fraction else together - other
                digits, unit = (1, f"{NBSP}points") if self.reading.is_fraction else (2, "")
                change = round(change, digits)
                sign = "+" if change > 0 else "−" if change < 0 else "±"
                better = "" if self.reading.higher_is_better else "; lower is better"
                cards.append((f"{sign}{abs(change):.{digits}f}{unit}", arm.against + better))
        moved = [(self.main.last(wire.of), wire.card) for wire in self.traffic]
        cards += [(bytes_text(count), words) for count, words in moved if count is not None]
        if (spent := self.fractions) is not None:
            traffic, flops = (percent_text(1 - fraction) for fraction in spent)
            cards.append(
                (traffic, f"of the adapter's traffic saved by the schedule ({self.reckoned})")
            )
            cards.append(
                (
                    flops,
                    (
                        "of the device's FLOPs for the adapter saved by the schedule"
                        f" ({self.reckoned})"
                    ),
                )
            )
        return cards

    @property
    def warnings(self) -> list[str]:
        """What is doubtful: of the data, and of a real peer's neighbours."""
        edges = self.main.summary.get("edges") or {}
        left_out = [
            f"{name} was left out of {edge['left_out']:,} of {sum(edge.values()):,} rounds"
            for name, edge in edges.items()
            if edge["left_out"]
        ]
        return [
            *self.start.get("warnings", []),
            *(self.main.summary.get("warnings") or []),
            *left_out,
        ]

    @property
    def judged(self) -> str:
        """On how many rows of which file every score is; empty where the log does not say."""
        rows = ((self.start.get("data") or {}).get("eval") or {}).get("rows")
        source = (self.config.get("data") or {}).get("eval")
        return (
            (f" on {rows:,} rows" + (f" of {Path(source).name}" if isinstance(source, str) else ""))
            if rows
            else ""
        )

    @property
    def steps_done(self) -> int:
        """Local steps of the first participant in the main run: in whole rounds, or up to the last
        change of who is active.
        """
        whole = self.main.rounds_done * self.main.local_steps[0] if self.main.local_steps else 0
        return max(whole, self.main.activity.last_change)

    @property
    def fractions(self) -> tuple[float, float] | None:
        """Adapter traffic and device FLOPs so far, of those with all units active; None without a
        schedule.

        The mean over the participants; of an unfinished run the first one's.
        """
        activity = self.main.activity
        if activity.first is None or not self.steps_done:
            return None
        reckoned, told = activity.fractions(activity.first, self.steps_done), self.main.summary
        return told.get("adapter_fraction", reckoned[0]), told.get(
            "device_flops_fraction", reckoned[1]
        )

    @property
    def reckoned(self) -> str:
        """From where the figures of what was saved come."""
        return "by the cost model" + (
            "" if self.split else ": no wire was used, all was computed here"
        )

    @property
    def traffic(self) -> list[Traffic]:
        """The wires of this run: between the peers, with the cloud, or both."""
        own = "own" in self.start
        between = Traffic(
            of="bytes_on_wire",
            column="Sent",
            meaning=("and received, by this peer" if own else "by all peers together")
            + "; 1 MB is 1,000,000 bytes.",
            card=("sent and received by this peer" if own else "sent by all peers together")
            + ": adapters, no rows of data",
            axis="sent and received by this peer" if own else "sent by all peers",
            caption=(
                "The same scores against what was sent. Runs that send nothing are level lines at"
                " their final score."
            ),
        )
        what = "embedded tokens, hidden states, updates and gradients"
        cloud = Traffic(
            of="cloud_bytes",
            column="With the cloud",
            meaning=(
                f"sent and received{'' if own else ' by all peers'}, also while scoring: {what}. No"
                " text and no labels are sent, yet a curious cloud can work out much of both:"
                " docs/privacy.md says how."
            )
            + (" 1 MB is 1,000,000 bytes." if self.device is not None else ""),
            card=(
                f"sent to the cloud and received: {what}; no text, no labels. What that hides and"
                " does not: docs/privacy.md"
                if self.device is not None
                else (
                    "to the cloud and back: no text, no labels; what that hides and does not:"
                    " docs/privacy.md"
                )
            ),
            axis="with the cloud, both ways",
            caption=(
                "The same scores against what went to the cloud and came back, scoring included."
            ),
        )
        return ([] if self.alone else [between]) + ([cloud] if self.split else [])

    def run_title(self, run: RunRecord) -> str:
        """What the page calls a run."""
        return "Alone" if self.one and self.device is None else run.arm.title

    def score(self, value: float | None) -> str:
        """A score in words of this run's metric."""
        return score_text(value, self.key)

    def final(self, run: RunRecord) -> float | None:
        """The last score of the figure that counts."""
        return run.figure({of: run.last(of) for of in ("consensus", "peers_mean")}, self.key)

    def colour(self, run: RunRecord) -> int:
        """The number of the page's colour."""
        return look(run)[0]

    @property
    def has_labels(self) -> bool:
        """Whether rows have labels that can be counted."""
        return any(peer.get("labels") for peer in self.start["peers"])


def look(run: RunRecord) -> tuple[int, int]:
    """The colour and the dashes of a run; they are the same on the whole page."""
    return _LOOKS.get(run.arm, (5, 3))


def _drawn(start: LogLine) -> str:
    """A sentence that says how many peers take part in a round; empty where all do."""
    if (part := start.get("participation")) is None:
        return ""
    count = several_text(drawn_count(part, len(start["peers"])), "peer")
    return f" Each round draws {count} anew; the others rest."
