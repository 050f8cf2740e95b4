"""A run as a page a person likes to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from dlora.drawing import MOST_NAMES, Line, Series, curves, graph, stacked_bars
from dlora.errors import RunError
from dlora.runlog import (
    BYTE_UNITS,
    NBSP,
    Event,
    RunRecord,
    bytes_text,
    read_log,
    run_records,
    score_text,
    seconds_text,
    unit_of,
    write_atomically,
)

_MEANINGS = {
    "dec-lora": "each peer trains on its own data and averages its adapter with its neighbours' after every round.",
    "pooled": "all data in one place, one adapter: what peers would reach if they could share their rows.",
    "local": "each peer by itself; here the peers' own mean counts, not the average of adapters that never met.",
    "fedavg": "after every round all peers take the average of all, as with a server.",
}
_LOOKS = {"dec-lora": (0, 0), "pooled": (1, 1), "local": (7, 2), "fedavg": (2, 3)}  # colour and dashes of each run
_GRAPHS = {
    "complete": "on a complete graph",
    "erdos-renyi": "on a random graph",
    "exponential": "on an exponential graph",
    "edges": "on a graph of their own",
    "base-k": "on a base-k graph",
}
_MOST_BARS = 40
_MOST_LABELS = 8


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into the run's folder and return its path: one file that needs no network.

    Reads config.yaml, log.jsonl and, once it is there, summary.json: an unfinished run is shown as far as it came.
    Raises RunError when the folder holds no run that has started.
    """
    import jinja2

    run_dir = Path(run_dir)
    config_text, events = _read(run_dir / "config.yaml"), read_log(run_dir / "log.jsonl")
    start = next((event for event in reversed(events) if event["event"] == "start"), None)
    if start is None:
        raise RunError(f"run {run_dir} has not started: its log.jsonl holds no start event; run it first")
    try:
        summary = json.loads(_read(run_dir / "summary.json")) if (run_dir / "summary.json").exists() else {}
        config = yaml.safe_load(config_text)
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"run {run_dir}: summary.json or config.yaml is damaged ({' '.join(str(error).split())})") from error
    page = _Page(config, start, run_records(events, start, summary), finished=bool(summary))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.globals |= {"bytes_text": bytes_text, "seconds_text": seconds_text}
    template = environment.from_string(files("dlora").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    path = run_dir / "report.html"
    write_atomically(path, template.render(page=page, config_text=config_text, start=start, summary=summary))
    return path


class _Page:
    """What the template asks for: sentences, numbers and pictures (SVG marked as safe; all else is escaped)."""

    def __init__(self, config: Mapping[str, Any], start: Event, runs: list[RunRecord], finished: bool) -> None:
        self.config, self.start, self.runs, self.finished = config, start, runs, finished
        self.main = next((run for run in runs if run.name == "dec-lora"), runs[0])
        self.names = [peer["name"] for peer in start["peers"]]
        every = [event.get("consensus") or {} for run in runs for event in run.scores.values()]
        # Perplexity is the loss in words a reader knows; a task with options is judged by accuracy.
        told = start["metric"] == "loss" and any("perplexity" in scores for scores in every)
        self.key: str = "perplexity" if told else start["metric"]
        self.higher_is_better = self.key == "accuracy"

    @property
    def title(self) -> str:
        return f"{len(self.names)} peers {_GRAPHS.get(self.topology, f'on a {self.topology}')}"

    @property
    def topology(self) -> str:
        return str(self.config.get("peers", {}).get("topology", {}).get("kind", "edges"))

    @property
    def others(self) -> list[RunRecord]:
        return [run for run in self.runs if run is not self.main]

    @property
    def sentence(self) -> str:
        """The result in words."""
        reached = self.final(self.main)
        if reached is None:
            return f"{self.title} started; nothing is scored yet."
        under_way = not self.finished and self.main.rounds_done < self.main.rounds
        so_far = f"So far, after {self.main.rounds_done} of {self.main.rounds} rounds: " if under_way else ""
        figure = f"{self.score(reached)} accuracy" if self.key == "accuracy" else f"a {self.key} of {self.score(reached)}"
        parts = [f"{so_far}{self.title} reached {figure} together"]
        phrases = {"pooled": "training on the pooled data {}", "fedavg": "FedAvg {}", "local": "alone they reached {}"}
        for run in sorted(self.others, key=lambda run: run.name == "local"):
            if (final := self.final(run)) is not None:
                parts.append(phrases.get(run.name, run.title + " {}").format(self.score(final)))
        return "; ".join(parts) + ("." if self.higher_is_better else " (lower is better).")

    @property
    def cards(self) -> list[tuple[str, str]]:
        """The few numbers to remember: (number, what it is)."""
        together = self.final(self.main)
        cards = [(self.score(together), f"{self.key} of the averaged adapter")] if together is not None else []
        for name, words in (("local", "against each peer alone"), ("pooled", "against pooling all data")):
            other = next((self.final(run) for run in self.others if run.name == name), None)
            if together is not None and other is not None:
                change = 100 * (together - other) if self.key == "accuracy" else together - other
                digits, unit = (1, f"{NBSP}points") if self.key == "accuracy" else (2, "")
                change = round(change, digits)
                sign = "+" if change > 0 else "−" if change < 0 else "±"
                better = "" if self.higher_is_better else "; lower is better"
                cards.append((f"{sign}{abs(change):.{digits}f}{unit}", words + better))
        if (sent := self.main.last("bytes_on_wire")) is not None:
            by = "sent and received by this peer" if "own" in self.start else "sent by all peers together"
            cards.append((bytes_text(sent), f"{by}: adapters, no rows of data"))
        return cards

    def score(self, value: float | None) -> str:
        return score_text(value, self.key)

    def final(self, run: RunRecord) -> float | None:
        return run.figure({of: run.last(of) for of in ("consensus", "peers_mean")}, self.key)

    def part(self, run: RunRecord, of: str) -> str:
        return self.score((run.last(of) or {}).get(self.key))

    def best(self, run: RunRecord) -> str:
        """The best score of the average and the round it came after; none where nobody talks."""
        logged = [{"rounds_done": done} | (event.get("consensus") or {}) for done, event in run.scores.items()]
        scored = [scores for scores in (run.summary.get("best"), *logged) if scores and scores.get(self.key) is not None]
        if run.name == "local" or not scored:
            return "–"
        best = (max if self.higher_is_better else min)(scored, key=lambda scores: scores[self.key])
        return f"{self.score(best[self.key])} after{NBSP}{best['rounds_done']}{NBSP}rounds"

    def state(self, run: RunRecord) -> str:
        """Empty for a run that is done."""
        if run.done or run.summary:
            return ""
        return f"{run.rounds_done} of {run.rounds} rounds" if run.rounds else "not started"

    def speed(self, run: RunRecord) -> str:
        value = run.summary.get("participant_steps_per_second")
        return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

    def colour(self, run: RunRecord) -> int:
        return _LOOKS.get(run.name, (5, 3))[0]

    @property
    def table_notes(self) -> list[tuple[str, str]]:
        """(word, what it means) for the runs there are and the columns."""
        better = "higher" if self.higher_is_better else "lower"
        notes = [(run.title, _MEANINGS[run.name]) for run in self.runs if run.name in _MEANINGS]
        return [
            *notes,
            (self.key.capitalize(), f"{better} is better; in bold the figure that counts."),
            ("Sent", "and received, by this peer; 1 MB is 1,000,000 bytes.")
            if "own" in self.start
            else ("Sent", "by all peers together; 1 MB is 1,000,000 bytes."),
            ("Steps/s", "local steps of all participants in a second."),
        ]

    @property
    def has_local(self) -> bool:
        return any(run.name == "local" and self._own(run) for run in self.runs)

    @property
    def has_labels(self) -> bool:
        return any(peer.get("labels") for peer in self.start["peers"])

    @property
    def score_pictures(self) -> list[tuple[str, str]]:
        """(SVG, caption): the score against rounds, bytes and seconds."""
        if not any(self.final(run) is not None for run in self.runs):
            return []
        better = "higher" if self.higher_is_better else "lower"
        sent, seconds = self.main.last("bytes_on_wire", 0), max(run.last("seconds", 0) or 0 for run in self.runs)
        unit, factor = unit_of(sent, BYTE_UNITS)
        who, by = (
            ("sent and received by this peer", "")
            if "own" in self.start
            else ("sent by all peers", ", which trained all peers itself")
        )
        clock, _ = unit_of(seconds, {"s": 1, "min": 120, "h": 7200})
        axes = [
            ("rounds_done", "rounds done", 1.0, f"Score after each round; {better} is better. "
             "Diamonds: the mean of the peers' own scores, from the worst peer to the best."),
            ("bytes_on_wire", f"{who} ({unit})", factor, "The same scores against what was sent. "
             "Runs that send nothing are level lines at their final score."),
            ("seconds", f"training and exchange ({clock})", {"s": 1, "min": 60, "h": 3600}[clock], "The same scores "
             f"against time on this machine{by}; evaluation is not counted."),
        ]  # fmt: skip
        return [(self._scores(*axis), axis[-1]) for axis in axes]

    @property
    def graph_picture(self) -> tuple[str, str]:
        edges = [[(int(a), int(b)) for a, b in one] for one in self.start["edges"]]
        gap = self.start.get("spectral_gap")
        caption = "Each dot is a peer, each line an exchange" + (
            "." if len(edges) == 1 else f"; who talks to whom repeats after {len(edges)} rounds."
        )
        if len(edges) > 1 or len(self.names) > MOST_NAMES:
            caption += " Peers lie clockwise from the top in the order of the table."
        if gap is not None:
            caption += f" Spectral gap {gap:.3g}: 1 means one round makes all agree, near 0 means news travels slowly."
        return graph(edges, self.names, label=f"{self.title}. {caption}"), caption

    @property
    def label_picture(self) -> tuple[str, str]:
        """Who holds which labels; only the rows when there are no labels."""
        peers = [peer for peer in self.start["peers"] if peer["rows"] is not None]  # a real peer knows its own only
        totals: dict[str, float] = {}
        for peer in peers:
            for name, count in (peer.get("labels") or {"rows": peer["rows"]}).items():
                totals[name] = totals.get(name, 0) + count
        kept = list(totals)
        if len(kept) > _MOST_LABELS:
            largest = sorted(kept, key=lambda name: -totals[name])[: _MOST_LABELS - 1]
            kept = [name for name in kept if name in largest]

        def bar(group: list[Mapping[str, Any]]) -> dict[str, float]:
            counts = dict.fromkeys(kept, 0.0)
            for peer in group:
                for name, count in (peer.get("labels") or {"rows": peer["rows"]}).items():
                    name = name if name in counts else f"{len(totals) - len(kept)} other labels"
                    counts[name] = counts.get(name, 0.0) + count / len(group)
            return counts

        shown, rest = (peers, []) if len(peers) <= _MOST_BARS else (peers[: _MOST_BARS - 1], peers[_MOST_BARS - 1 :])
        rows = {peer["name"]: bar([peer]) for peer in shown} | ({f"{len(rest)} more, mean": bar(rest)} if rest else {})
        caption = "How many training rows each peer holds"
        same = ", by label. Bars of the same make-up mean similar data; different ones, that no peer has seen it all."
        caption += same if self.has_labels else "."
        return stacked_bars(rows, "training rows", label=caption), caption

    @property
    def round_pictures(self) -> list[tuple[str, str]]:
        """(SVG, caption): consensus distance and training loss against rounds."""
        pictures = []
        talkers = [run for run in self.runs if run.name != "pooled"]
        apart = [self._series(run, run.by_round, "consensus_distance", positive=True) for run in talkers]
        apart = [one for one in apart if any(value is not None for value in one.y)]
        if apart:
            caption = (
                "Consensus distance, log axis: how far the peers' factors lie from their mean after each round. "
                "Falling means they agree; level means the exchange keeps up with what each learns by itself."
            )
            pictures.append((curves(apart, "round", "consensus distance", label=caption, log_y=True), caption))
        losses = [self._series(run, run.by_round, "loss") for run in self.runs if run.by_round]
        if losses:
            caption = "Training loss, mean over the participants; lower is better. Shaded: from lowest to highest peer."
            pictures.append((curves(losses, "round", "training loss", label=caption), caption))
        return pictures

    @property
    def peer_rows(self) -> list[tuple[str, str, str, str, str]]:
        """(name, rows, labels, its own score in the main run, its score alone)."""
        own, alone = self._own(self.main), self._own(next((run for run in self.runs if run.name == "local"), None))

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
        return [(name, *(f"{edge[of]:,}" for of in ("mixed", "left_out", "in_doubt"))) for name, edge in counts.items()]

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

    def _scores(self, over: str, x_label: str, factor: float, label: str) -> str:
        percent = 100 if self.key == "accuracy" else 1
        series, lines, values = [], [], []
        for run in self.runs:
            colour, dash = _LOOKS.get(run.name, (5, 3))
            points = [
                (event[over] / factor if factor != 1 else event[over], value * percent)
                for event in run.scores.values()
                if (value := run.figure(event, self.key)) is not None and event.get(over) is not None
            ]
            values += [y for _, y in points]
            if len({x for x, _ in points}) > 1:
                series.append(
                    Series(
                        name=run.title,
                        x=[x for x, _ in points],
                        y=[y for _, y in points],
                        colour=colour,
                        dash=dash,
                        main=run is self.main,
                    )
                )
            elif (final := self.final(run)) is not None:
                lines.append(Line(name=f"{run.title} {self.score(final)}", y=final * percent, colour=colour, dash=dash))
        own = [
            (
                event[over] / factor if factor != 1 else event[over],
                [s[self.key] * percent for s in event["peers"].values() if s.get(self.key) is not None],
            )
            for event in self.main.scores.values()
            if event.get("peers") and event.get(over) is not None
        ]
        own = [(x, scores) for x, scores in own if scores]
        if own:
            series.append(
                Series(
                    name="Peers' own",
                    x=[x for x, _ in own],
                    y=[sum(s) / len(s) for _, s in own],
                    low=[min(s) for _, s in own],
                    high=[max(s) for _, s in own],
                    colour=4,
                    points_only=True,
                )
            )
        wide = self.key == "perplexity" and max(values, default=1) > 10 * min(values, default=1) > 0
        return curves(
            series,
            x_label,
            f"{self.key} (%)" if percent == 100 else self.key,
            label=label,
            log_y=wide,
            reference_lines=lines,
        )

    def _series(self, run: RunRecord, events: Mapping[int, Event], key: str, positive: bool = False) -> Series:
        values = [event.get(key) for event in events.values()]
        colour, dash = _LOOKS.get(run.name, (5, 3))
        band = key == "loss" and run is self.main
        spread = [
            [value for value in event.get("losses") or [event.get(key)] if value is not None] for event in events.values()
        ]
        return Series(
            name=run.title,
            x=list(events),
            y=[None if positive and not (value and value > 0) else value for value in values],
            low=[min(each, default=None) for each in spread] if band else None,
            high=[max(each, default=None) for each in spread] if band else None,
            colour=colour,
            dash=dash,
            main=run is self.main,
        )


def _label_text(labels: Mapping[str, int]) -> str:
    """The labels a peer holds; when there are many, its largest."""
    held = {name: count for name, count in labels.items() if count}
    shown = list(held) if len(held) <= _MOST_LABELS else sorted(held, key=lambda name: -held[name])[: _MOST_LABELS - 1]
    more = f" and {len(held) - len(shown)} more" if len(shown) < len(held) else ""
    return ", ".join(f"{name} {held[name]:,}" for name in shown) + more


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); give the folder of a run") from error
