"""What a run's page says in words, numbers and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlora.config.arms import DEC_LORA, DLORA, FEDAVG, LOCAL, POOLED
from dlora.events.log import Event
from dlora.events.record import RunRecord
from dlora.show.words import NBSP, bytes_text, error_text, percent_text, score_text, seconds_text

# colour and dashes
_LOOKS = {DEC_LORA: (0, 0), DLORA: (0, 0), POOLED: (1, 1), LOCAL: (7, 2), FEDAVG: (2, 3)}
_GRAPHS = {
    "complete": "on a complete graph",
    "erdos-renyi": "on a random graph",
    "exponential": "on an exponential graph",
    "edges": "on a graph of their own",
    "base-k": "on a base-k graph",
}
MOST_LABELS = 8
MOST_CONFUSED = 30  # labels of a table that people still read


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
        start: Event,
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
        self.higher_is_better = self.key == "accuracy"

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
            return f"{self.title} started; nothing is scored yet."
        under_way = not self.finished and self.main.rounds_done < self.main.rounds
        so_far = (
            f"So far, after {self.main.rounds_done} of {self.main.rounds} rounds: "
            if under_way
            else ""
        )
        figure = (
            f"{self.score(reached)} accuracy"
            if self.key == "accuracy"
            else f"a {self.key} of {self.score(reached)}"
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
        return "; ".join(parts) + ("." if self.higher_is_better else " (lower is better).")

    @property
    def cards(self) -> list[tuple[str, str]]:
        """The few numbers to remember: (number, what it is)."""
        together = self.final(self.main)
        whose = "the adapter" if self.one else "the averaged adapter"
        cards = (
            [(self.score(together), f"{self.key} of {whose}{self.judged}")]
            if together is not None
            else []
        )
        for arm in (LOCAL, POOLED):
            other = next((self.final(run) for run in self.others if run.arm is arm), None)
            if together is not None and other is not None:
                change = 100 * (together - other) if self.key == "accuracy" else together - other
                digits, unit = (1, f"{NBSP}points") if self.key == "accuracy" else (2, "")
                change = round(change, digits)
                sign = "+" if change > 0 else "−" if change < 0 else "±"
                better = "" if self.higher_is_better else "; lower is better"
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
        """Where the figures of what was saved come from."""
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

    def cells(self, run: RunRecord) -> list[tuple[str, bool]]:
        """(text, whether it is the figure that counts) in the table of runs, behind the run's
        name.
        """
        own = [] if self.one else [(self.part(run, "peers_mean"), run.arm.counts == "peers_mean")]
        moved = [bytes_text(run.last(wire.of)) for wire in self.traffic]
        plain = [
            self.best(run),
            *moved,
            seconds_text(run.last("seconds")),
            self.speed(run),
            self.tokens(run),
        ]
        return [
            (self.part(run, "consensus"), run.arm.counts == "consensus"),
            *own,
            *((text, False) for text in plain),
        ]

    def run_title(self, run: RunRecord) -> str:
        """What the page calls a run."""
        return "Alone" if self.one and self.device is None else run.arm.title

    def score(self, value: float | None) -> str:
        """A score in words of this run's metric."""
        return score_text(value, self.key)

    def final(self, run: RunRecord) -> float | None:
        """The last score of the figure that counts."""
        return run.figure({of: run.last(of) for of in ("consensus", "peers_mean")}, self.key)

    def part(self, run: RunRecord, of: str) -> str:
        """The last score of the average (consensus) or of the peers' mean (peers_mean), of a sample
        with its standard error.
        """
        error = (run.last("peers_mean_error") or {}).get(self.key) if of == "peers_mean" else None
        return self.score((run.last(of) or {}).get(self.key)) + error_text(error, self.key)

    def best(self, run: RunRecord) -> str:
        """The best score of the average and the round it came after; none where nobody talks."""
        logged = [
            {"rounds_done": done} | (event.get("consensus") or {})
            for done, event in run.scores.items()
        ]
        scored = [
            scores
            for scores in (run.summary.get("best"), *logged)
            # before the first, nothing was trained
            if scores and scores.get(self.key) is not None and scores["rounds_done"]
        ]
        if run.arm.counts != "consensus" or not scored:
            return "–"
        best = (max if self.higher_is_better else min)(scored, key=lambda scores: scores[self.key])
        return f"{self.score(best[self.key])} after{NBSP}{best['rounds_done']}{NBSP}rounds"

    def state(self, run: RunRecord) -> str:
        """Empty for a run that is done."""
        if run.done or run.summary:
            return ""
        return f"{run.rounds_done} of {run.rounds} rounds" if run.rounds else "not started"

    def speed(self, run: RunRecord) -> str:
        """Local steps in a second."""
        value = run.summary.get("participant_steps_per_second")
        return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

    def tokens(self, run: RunRecord) -> str:
        """Tokens in a second."""
        value = run.summary.get("tokens_per_second")
        return "–" if value is None else f"{value:,.0f}"

    @property
    def times(self) -> list[tuple[str, list[str]]]:
        """(what for, seconds of each run and of all together): where the time went, once it is
        over.
        """
        whole = self.summary.get("spent_s")
        if not whole:
            return []
        rows = [("Start-up", [*("" for _ in self.runs), seconds_text(whole["start_up"])])]
        for kind in ("training", "exchange", "scoring", "saving"):
            own = [seconds_text((run.summary.get("spent_s") or {}).get(kind)) for run in self.runs]
            rows.append((kind.capitalize(), [*own, seconds_text(whole[kind])]))
        return rows

    @property
    def confusion(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """(label, (rows, per cent of the label's) by the label they were taken for) of the main
        run's average at the end.
        """
        counts, names = self.main.summary.get("confusion"), self.summary.get("label_names") or []
        if not counts or len(counts) != len(names) or len(names) > MOST_CONFUSED:
            return []
        return [
            (name, [(count, round(100 * count / max(1, sum(row)))) for count in row])
            for name, row in zip(names, counts, strict=True)
        ]

    @property
    def cut(self) -> str:
        """What data.max_length took from the training rows; empty where nothing, or where the log
        does not say.
        """
        facts: Mapping[str, Any] = (self.start.get("data") or {}).get("train") or {}
        if not facts.get("cut_rows"):
            return ""
        share = percent_text(facts["cut_share"])
        return (
            f"{facts['cut_rows']:,} of {facts['rows']:,} training rows; {share} of what is learned"
            " is gone"
        )

    @property
    def learning_rate(self) -> str:
        """As configured, and where it ended."""
        train: Mapping[str, Any] = self.config.get("train") or {}
        kind = train.get("lr_scheduler_type", "constant")
        last = self.main.latest.get("learning_rate")
        if train.get("learning_rate") is None:
            return "–"
        ended = (
            ""
            if kind == "constant" or last is None
            else f", {last:.3g} in the last step of round {self.main.rounds_done}"
        )
        return f"{train['learning_rate']:g}, {kind}{ended}"

    def colour(self, run: RunRecord) -> int:
        """The number of the page's colour."""
        return look(run)[0]

    @property
    def table_notes(self) -> list[tuple[str, str]]:
        """(word, what it means) for the runs there are and the columns."""
        better = "higher" if self.higher_is_better else "lower"
        known = (
            []
            if self.one and self.device is None
            else [run.arm for run in self.runs if run.arm.meaning]
        )
        notes = [(arm.title, arm.meaning) for arm in known]
        return [
            *notes,
            (
                self.key.capitalize(),
                f"{better} is better" + ("." if self.one else "; the bold figure is the result."),
            ),
            *((wire.column, wire.meaning) for wire in self.traffic),
            ("Steps/s", f"local steps{'' if self.one else ' of all participants'} in a second."),
            ("Tokens/s", "tokens of training texts in a second, padding left out."),
        ]

    @property
    def has_local(self) -> bool:
        """Whether there are scores of peers that never talked."""
        return any(run.arm is LOCAL and self._own(run) for run in self.runs)

    @property
    def has_labels(self) -> bool:
        """Whether rows have labels that can be counted."""
        return any(peer.get("labels") for peer in self.start["peers"])

    @property
    def held(self) -> str:
        """The rows of a device and their labels."""
        peer = self.start["peers"][0]
        labels = _label_text(peer.get("labels") or {}, ": ")
        return f"{peer['rows']:,}" + (f" ({labels})" if labels else "")

    @property
    def peer_rows(self) -> list[tuple[str, str, str, str, str]]:
        """(name, rows, labels, its own score in the main run, its score alone)."""
        own, alone = (
            self._own(self.main),
            self._own(next((run for run in self.runs if run.arm is LOCAL), None)),
        )

        def score(of: Mapping[str, Any], name: str) -> str:
            return self.score((of.get(name) or {}).get(self.key))

        return [
            (
                name,
                "–" if peer["rows"] is None else f"{peer['rows']:,}",
                _label_text(peer.get("labels") or {}),
                score(own, name),
                score(alone, name),
            )
            for name, peer in zip(self.names, self.start["peers"], strict=True)
        ]

    @property
    def edge_rows(self) -> list[tuple[str, ...]]:
        """(neighbour, rounds mixed, rounds left out, in doubt) of a real peer."""
        counts = self.main.summary.get("edges") or {}
        return [
            (name, *(f"{edge[of]:,}" for of in ("mixed", "left_out", "in_doubt")))
            for name, edge in counts.items()
        ]

    @property
    def loading(self) -> str:
        """Python that loads the averaged adapter with PEFT."""
        run = str(self.config.get("output_dir", "RUN"))
        return (
            "import dlora, peft\n\n"
            f"base, tokenizer = dlora.load_base({run!r})  # the frozen model of this run\n"
            f"model = peft.PeftModel.from_pretrained(base, {run + '/consensus'!r})"
        )

    def _own(self, run: RunRecord | None) -> Mapping[str, Any]:
        return (run.last("peers") or {}) if run else {}


def look(run: RunRecord) -> tuple[int, int]:
    """The colour and the dashes of a run, the same all over the page."""
    return _LOOKS.get(run.arm, (5, 3))


def _label_text(labels: Mapping[str, int], between: str = " ") -> str:
    """The labels a peer holds; when there are many, its largest."""
    held = {name: count for name, count in labels.items() if count}
    shown = (
        list(held)
        if len(held) <= MOST_LABELS
        else sorted(held, key=lambda name: -held[name])[: MOST_LABELS - 1]
    )
    more = f" and {len(held) - len(shown)} more" if len(shown) < len(held) else ""
    return ", ".join(f"{name}{between}{held[name]:,}" for name in shown) + more
