"""The pictures of a run's page, as SVG, each with its caption."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from dlora.events.activity import unit_labels
from dlora.events.log import LogLine
from dlora.events.record import RunRecord
from dlora.show.drawing import MOST_NAMES, Line, Series, curves, graph, heat_map, stacked_bars
from dlora.show.report.page import MOST_LABELS, Page, look
from dlora.show.words import BYTE_UNITS, percent_text, unit_of

_MOST_BARS = 40


class Pictures:
    """The pictures of one page. Each is (SVG, caption), and the SVG is safe to place as it is.

    It is one class because each method is one picture, and all are of the same page.
    """

    def __init__(self, page: Page) -> None:
        self.page = page

    @cached_property
    def scores(self) -> list[tuple[str, str]]:
        """(SVG, caption): the score against rounds, bytes and seconds; nothing where no run was
        scored twice.
        """
        if not any(
            len(run.scores) > 1 and self.page.final(run) is not None for run in self.page.runs
        ):
            return []
        page, through = self.page, self.page.device is not None
        better = "higher" if page.reading.higher_is_better else "lower"
        diamonds = (
            ""
            if page.alone
            else " Diamonds: the mean of the peers' own scores, from the worst peer to the best."
        )
        axes = [
            (
                "rounds_done",
                "rounds done",
                1.0,
                (
                    f"The score wherever it was measured, joined by lines; {better} is"
                    f" better.{diamonds}"
                ),
            )
        ]
        for wire in page.traffic:
            unit, factor = unit_of(page.main.last(wire.of, 0), BYTE_UNITS)
            axes.append((wire.of, f"{wire.axis} ({unit})", factor, wire.caption))
        clock, _ = unit_of(
            max(run.last("seconds", 0) or 0 for run in page.runs), {"s": 1, "min": 120, "h": 7200}
        )
        everybody = (
            f", which trained all peers{' and was their cloud' if page.split else ''} itself"
            if not page.alone
            else ""
        )
        where = (
            ", the cloud's part and waiting for it included"
            if through
            else ""
            if "own" in page.start
            else everybody
        )
        spent_on = "training" + (
            " through the cloud" if through else "" if page.alone else " and exchange"
        )
        axes.append(
            (
                "seconds",
                f"{spent_on} ({clock})",
                {"s": 1.0, "min": 60.0, "h": 3600.0}[clock],
                f"The same scores against time on this machine{where}; evaluation is not counted.",
            )
        )
        return [(self._scores(*axis), axis[-1]) for axis in axes]

    @cached_property
    def graph(self) -> tuple[str, str]:
        """Who talks to whom."""
        edges = [[(int(a), int(b)) for a, b in one] for one in self.page.start["edges"]]
        gap = self.page.start.get("spectral_gap")
        caption = "Each dot is a peer, each line an exchange" + (
            "." if len(edges) == 1 else f"; who talks to whom repeats after {len(edges)} rounds."
        )
        if len(edges) > 1 or len(self.page.names) > MOST_NAMES:
            caption += " Peers lie clockwise from the top in the order of the table."
        if gap is not None:
            caption += (
                f" Spectral gap {gap:.3g}: 1 means one round makes all agree, near 0 means news"
                " travels slowly."
            )
        return graph(edges, self.page.names, label=f"{self.page.title}. {caption}"), caption

    @cached_property
    def labels(self) -> tuple[str, str]:
        """Who holds which labels; only the rows when there are no labels."""
        # a real peer knows its own only
        peers = [peer for peer in self.page.start["peers"] if peer["rows"] is not None]
        totals: dict[str, float] = {}
        for peer in peers:
            for name, count in (peer.get("labels") or {"rows": peer["rows"]}).items():
                totals[name] = totals.get(name, 0) + count
        kept = list(totals)
        if len(kept) > MOST_LABELS:
            largest = sorted(kept, key=lambda name: -totals[name])[: MOST_LABELS - 1]
            kept = [name for name in kept if name in largest]

        def bar(group: list[Mapping[str, Any]]) -> dict[str, float]:
            counts = dict.fromkeys(kept, 0.0)
            for peer in group:
                for name, count in (peer.get("labels") or {"rows": peer["rows"]}).items():
                    name = name if name in counts else f"{len(totals) - len(kept)} other labels"
                    counts[name] = counts.get(name, 0.0) + count / len(group)
            return counts

        shown, rest = (
            (peers, [])
            if len(peers) <= _MOST_BARS
            else (peers[: _MOST_BARS - 1], peers[_MOST_BARS - 1 :])
        )
        rows = {peer["name"]: bar([peer]) for peer in shown} | (
            {f"{len(rest)} more, mean": bar(rest)} if rest else {}
        )
        caption = "How many training rows each peer holds"
        same = (
            ", by label. Bars of the same make-up mean similar data; different ones, that no peer"
            " has seen it all."
        )
        caption += same if self.page.has_labels else "."
        return stacked_bars(rows, "training rows", label=caption), caption

    @cached_property
    def rounds(self) -> list[tuple[str, str]]:
        """(SVG, caption): consensus distance and training loss against rounds."""
        pictures = []
        talkers = [run for run in self.page.runs if not run.arm.pooled]
        apart = [
            self._series(run, run.by_round, "consensus_distance", positive=True) for run in talkers
        ]
        apart = [one for one in apart if any(value is not None for value in one.y)]
        if apart:
            caption = (
                "Consensus distance, log axis: how far the peers' factors lie from their mean after"
                " each round. Falling means they agree; level means the exchange keeps up with what"
                " each learns by itself."
            )
            pictures.append(
                (curves(apart, "round", "consensus distance", label=caption, log_y=True), caption)
            )
        losses = [self._series(run, run.by_round, "loss") for run in self.page.runs if run.by_round]
        if losses:
            caption = (
                "Training loss, mean over the participants; lower is better. Shaded: from lowest to"
                " highest peer."
            )
            if self.page.alone:
                caption = "Training loss, mean over each round's local steps; lower is better."
            pictures.append((curves(losses, "round", "training loss", label=caption), caption))
        return pictures

    @cached_property
    def activity(self) -> list[tuple[str, str]]:
        """(SVG, caption): who was active when; nothing for a run without a schedule."""
        page, activity = self.page, self.page.main.activity
        spent, peer, steps = page.fractions, activity.first, page.steps_done
        if spent is None or peer is None:
            return []
        edges = activity.columns(peer, steps)
        shares = activity.shares(peer, edges)
        widths = [end - start for start, end in zip(edges, edges[1:], strict=False)]
        trained = [
            round(sum(share * width for share, width in zip(row, widths, strict=True)))
            for row in shares
        ]
        several = (
            f" of {peer}, the first of {len(page.names)} participants"
            if len(page.names) > 1
            else ""
        )
        coarse = any(0 < share < 1 for row in shares for share in row)
        caption = (
            f"Which units trained when{several}. A row is a unit: modules that share one input,"
            " behind the number of their block, the lowest first. A column is a local step"
            + (
                "; the more colour, the more of the steps around it the unit was active."
                if coarse
                else "; coloured: active."
            )
            + f" Of {steps:,} steps the unit that trained least was active in {min(trained):,}, the"
            f" one that trained most in {max(trained):,}. So far the schedule saved"
            f" {percent_text(1 - spent[0])} of the adapter's traffic and"
            f" {percent_text(1 - spent[1])} of what a device in a split computes for the adapter,"
            f" both of those with all units active ({page.reckoned})."
        )
        rows = [*zip(unit_labels(activity.modules), shares, strict=True)]
        return [(heat_map(rows, edges, "local step", label=caption), caption)]

    def _scores(self, over: str, x_label: str, factor: float, label: str) -> str:
        percent = 100 if self.page.reading.is_fraction else 1
        series, lines, values = [], [], []
        for run in self.page.runs:
            colour, dash = look(run)
            points = [
                (event[over] / factor if factor != 1 else event[over], value * percent)
                for event in run.scores.values()
                if (value := run.figure(event, self.page.key)) is not None
                and event.get(over) is not None
            ]
            values += [y for _, y in points]
            if len({x for x, _ in points}) > 1:
                series.append(
                    Series(
                        name=self.page.run_title(run),
                        x=[x for x, _ in points],
                        y=[y for _, y in points],
                        colour=colour,
                        dash=dash,
                        main=run is self.page.main,
                    )
                )
            elif (final := self.page.final(run)) is not None:
                lines.append(
                    Line(
                        name=f"{self.page.run_title(run)} {self.page.score(final)}",
                        y=final * percent,
                        colour=colour,
                        dash=dash,
                    )
                )
        own = [
            (
                event[over] / factor if factor != 1 else event[over],
                [
                    s[self.page.key] * percent
                    for s in event["peers"].values()
                    if s.get(self.page.key) is not None
                ],
            )
            for event in self.page.main.scores.values()
            if event.get("peers") and event.get(over) is not None
        ]
        own = [(x, scores) for x, scores in own if scores]
        if own and not self.page.alone:
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
        wide = (
            self.page.key == "perplexity"
            and max(values, default=1) > 10 * min(values, default=1) > 0
        )
        return curves(
            series,
            x_label,
            f"{self.page.reading.word} (%)" if percent == 100 else self.page.reading.word,
            label=label,
            log_y=wide,
            reference_lines=lines,
        )

    def _series(
        self, run: RunRecord, events: Mapping[int, LogLine], key: str, positive: bool = False
    ) -> Series:
        values = [event.get(key) for event in events.values()]
        colour, dash = look(run)
        band = key == "loss" and run is self.page.main and not self.page.alone
        spread = [
            [value for value in event.get("losses") or [event.get(key)] if value is not None]
            for event in events.values()
        ]
        return Series(
            name=self.page.run_title(run),
            x=list(events),
            y=[None if positive and not (value and value > 0) else value for value in values],
            low=[min(each, default=None) for each in spread] if band else None,
            high=[max(each, default=None) for each in spread] if band else None,
            colour=colour,
            dash=dash,
            main=run is self.page.main,
        )
