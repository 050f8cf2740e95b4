"""What the tables of the page say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlora.config.arms import LOCAL
from dlora.events.record import RunRecord
from dlora.show.report.page import MOST_LABELS, Page
from dlora.show.words import NBSP, bytes_text, error_text, percent_text, seconds_text

MOST_CONFUSED = 30  # labels of a table that people still read
MOST_PEERS = 50  # in the table; of more the best, the worst and some
MOST_BEST = 10  # and as many of the worst


class Tables:
    """What the template writes into tables, for a page; all of it is escaped there."""

    def __init__(self, page: Page) -> None:
        self.page, self.key = page, page.key

    def cells(self, run: RunRecord) -> list[tuple[str, bool]]:
        """(text, whether it is the figure that counts) in the table of runs, behind the run's
        name.
        """
        own = (
            []
            if self.page.one
            else [(self.part(run, "peers_mean"), run.arm.counts == "peers_mean")]
        )
        moved = [bytes_text(run.last(wire.of)) for wire in self.page.traffic]
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

    def part(self, run: RunRecord, of: str) -> str:
        """The last score of the average (consensus) or of the peers' mean (peers_mean), of a sample
        with its standard error.
        """
        error = (run.last("peers_mean_error") or {}).get(self.key) if of == "peers_mean" else None
        return self.page.score((run.last(of) or {}).get(self.key)) + error_text(error, self.key)

    def best(self, run: RunRecord) -> str:
        """The best score of the average, and the round after which it came; none where peers do not
        exchange.
        """
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
        best = (max if self.page.reading.higher_is_better else min)(
            scored, key=lambda scores: scores[self.key]
        )
        return f"{self.page.score(best[self.key])} after{NBSP}{best['rounds_done']}{NBSP}rounds"

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
        whole = self.page.summary.get("spent_s")
        if not whole:
            return []
        rows = [("Start-up", [*("" for _ in self.page.runs), seconds_text(whole["start_up"])])]
        for kind in ("training", "exchange", "scoring", "saving"):
            own = [
                seconds_text((run.summary.get("spent_s") or {}).get(kind)) for run in self.page.runs
            ]
            rows.append((kind.capitalize(), [*own, seconds_text(whole[kind])]))
        return rows

    @property
    def confusion(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """(label, (rows, per cent of the label's) by the label they were taken for) of the main
        run's average at the end.
        """
        counts, names = (
            self.page.main.summary.get("confusion"),
            self.page.summary.get("label_names") or [],
        )
        if not counts or len(counts) != len(names) or len(names) > MOST_CONFUSED:
            return []
        return [
            (name, [(count, round(100 * count / max(1, sum(row)))) for count in row])
            for name, row in zip(names, counts, strict=True)
        ]

    @property
    def cut(self) -> str:
        """What data.max_length took from the training rows. Empty where it took nothing, or where
        the log does not say.
        """
        facts: Mapping[str, Any] = (self.page.start.get("data") or {}).get("train") or {}
        if not facts.get("cut_rows"):
            return ""
        share = percent_text(facts["cut_share"])
        return (
            f"{facts['cut_rows']:,} of {facts['rows']:,} training rows; {share} of what is learned"
            " is gone"
        )

    @property
    def learning_rate(self) -> str:
        """The learning rate as configured, and where it ended."""
        train: Mapping[str, Any] = self.page.config.get("train") or {}
        kind = train.get("lr_scheduler_type", "constant")
        last = self.page.main.latest.get("learning_rate")
        if train.get("learning_rate") is None:
            return "–"
        ended = (
            ""
            if kind == "constant" or last is None
            else f", {last:.3g} in the last step of round {self.page.main.rounds_done}"
        )
        return f"{train['learning_rate']:g}, {kind}{ended}"

    @property
    def table_notes(self) -> list[tuple[str, str]]:
        """(word, what it means) for the runs there are and the columns."""
        better = "higher" if self.page.reading.higher_is_better else "lower"
        known = (
            []
            if self.page.one and self.page.device is None
            else [run.arm for run in self.page.runs if run.arm.meaning]
        )
        notes = [(arm.title, arm.meaning) for arm in known]
        return [
            *notes,
            (
                self.page.reading.word.capitalize(),
                f"{better} is better"
                + ("." if self.page.one else "; the bold figure is the result."),
            ),
            *((wire.column, wire.meaning) for wire in self.page.traffic),
            (
                "Steps/s",
                f"local steps{'' if self.page.one else ' of all participants'} in a second.",
            ),
            ("Tokens/s", "tokens of training texts in a second, padding left out."),
        ]

    @property
    def has_local(self) -> bool:
        """Whether there are scores of peers that never talked."""
        return any(run.arm is LOCAL and self._own(run) for run in self.page.runs)

    @property
    def held(self) -> str:
        """The rows of a device, and their labels."""
        peer = self.page.start["peers"][0]
        labels = _label_text(peer.get("labels") or {}, ": ")
        return f"{peer['rows']:,}" + (f" ({labels})" if labels else "")

    @property
    def peer_rows(self) -> list[tuple[str, str, str, str, str]]:
        """(name, rows, labels, its own score in the main run, its score alone)."""
        own, alone = (
            self._own(self.page.main),
            self._own(next((run for run in self.page.runs if run.arm is LOCAL), None)),
        )

        def score(of: Mapping[str, Any], name: str) -> str:
            return self.page.score((of.get(name) or {}).get(self.key))

        shown = self._shown(own or alone)
        return [
            (
                name,
                "–" if peer["rows"] is None else f"{peer['rows']:,}",
                _label_text(peer.get("labels") or {}),
                score(own, name),
                score(alone, name),
            )
            for name, peer in zip(self.page.names, self.page.start["peers"], strict=True)
            if name in shown
        ]

    def _shown(self, scores: Mapping[str, Any]) -> set[str]:
        """The peers in the table: all, or the best, the worst and the first of the others."""
        if len(self.page.names) <= MOST_PEERS:
            return set(self.page.names)
        judged = [name for name in scores if scores[name].get(self.key) is not None]
        judged.sort(
            key=lambda name: scores[name][self.key], reverse=self.page.reading.higher_is_better
        )
        chosen = list(dict.fromkeys([*judged[:MOST_BEST], *judged[-MOST_BEST:]]))
        others = [name for name in (*judged, *self.page.names) if name not in set(chosen)]
        return {*chosen, *[*dict.fromkeys(others)][: MOST_PEERS - len(chosen)]}

    @property
    def peers_left_out(self) -> str:
        """Where the peers are that the table does not show; empty where it shows all."""
        count = len(self.page.names)
        if count <= MOST_PEERS:
            return ""
        best = f"the {MOST_BEST} best and the {MOST_BEST} worst of those with a score among them"
        return f"{MOST_PEERS} of {count:,} peers, {best}; summary.json has all."

    @property
    def edge_rows(self) -> list[tuple[str, ...]]:
        """(neighbour, rounds mixed, rounds left out, in doubt) of a real peer."""
        counts = self.page.main.summary.get("edges") or {}
        return [
            (name, *(f"{edge[of]:,}" for of in ("mixed", "left_out", "in_doubt")))
            for name, edge in counts.items()
        ]

    @property
    def loading(self) -> str:
        """How the averaged adapter is loaded, from the folder where the run was started."""
        run = str(self.page.config.get("output_dir", "RUN"))
        if self.page.config.get("bottleneck") is not None:
            return f"# PEFT has no bottleneck adapters: the code is in {run}/consensus/README.md"
        return (
            "import dlora, peft\n\n"
            f"base, tokenizer = dlora.load_base({run!r})  # the frozen model of this run\n"
            f"model = peft.PeftModel.from_pretrained(base, {run + '/consensus'!r})"
        )

    def _own(self, run: RunRecord | None) -> Mapping[str, Any]:
        return (run.last("peers") or {}) if run else {}


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
