"""Curves, bars, heat maps and graphs as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlora.show.svg import FAINT, INK, PALETTE, PAPER, as_svg, blank, ink

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)))
_WIDTH = 400  # user units: about the width of a phone, so that 12 units of text stay readable there
_MOST_PANELS = 6
MOST_NAMES = 20
_MOST_LINES = 3000  # of a graph; a file of 100,000 lines has 24 MB
_MOST_DOTS = 1000  # which touch one another then


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve; `y` may hold None where nothing was measured. `low` and `high` shade or bar the
    range around it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    colour: int = 0
    dash: int = 0
    main: bool = False
    points_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A horizontal line of reference."""

    name: str
    y: float
    colour: int = 0
    dash: int = 1


def curves(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    label: str,
    log_y: bool = False,
    reference_lines: Sequence[Line] = (),
) -> str:
    """Curves over one axis, a legend above; `label` says in words what is to be seen, for those who
    cannot see it.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    with blank(_WIDTH, 290) as figure:
        axes = figure.add_subplot()
        for one in series:
            _draw(axes, one)
        for line in reference_lines:
            axes.axhline(
                line.y,
                color=ink(line.colour),
                linestyle=_DASHES[line.dash],
                linewidth=1.8,
                label=line.name,
                zorder=1.5,
            )
        if log_y:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
            axes.yaxis.set_major_formatter(_power_text)
            axes.yaxis.set_minor_formatter("")
        if all(isinstance(x, int) for one in series for x in one.x):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.margins(x=0.03)
        _legend(figure, *axes.get_legend_handles_labels())
        return as_svg(figure, label)


def stacked_bars(rows: Mapping[str, Mapping[str, float]], x_label: str, *, label: str) -> str:
    """One horizontal bar for each key, made of its named parts in the order they first appear; at
    most 8 parts.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    with blank(_WIDTH, 74 + 17 * len(rows) + 17 * math.ceil(len(parts) / 3)) as figure:
        axes = figure.add_subplot()
        left = [0.0] * len(rows)
        handles = []
        for number, part in enumerate(parts):
            widths = [row.get(part, 0) for row in rows.values()]
            handles.append(
                axes.barh(
                    range(len(rows)),
                    widths,
                    left=left,
                    height=0.76,
                    color=ink(number),
                    edgecolor=PAPER,
                    linewidth=0.8,
                )
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(rows)), [_short(name, 16) for name in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(x_label)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        if len(parts) > 1:
            _legend(figure, handles, [_short(part, 22) for part in parts])
        return as_svg(figure, label)


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]], edges: Sequence[float], x_label: str, *, label: str
) -> str:
    """A row for each (name, values from 0 to 1): between two ``edges`` the more colour the larger
    the value.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.ticker import MaxNLocator

    height = max(4.0, min(13.0, 420 / len(rows)))
    apart = math.ceil(11 / height)  # rows from one name to the next, so that names do not touch
    # share -> corners of all its cells: one path, however many
    shades: dict[float, list[tuple[float, float]]] = {}
    for number, (_, values) in enumerate(rows):
        begins = 0
        eighths = [math.ceil(8 * value) / 8 for value in values]
        for column, shade in enumerate(eighths):
            if column + 1 == len(eighths) or eighths[column + 1] != shade:
                left, right, top, bottom = (
                    edges[begins],
                    edges[column + 1],
                    number - 0.4,
                    number + 0.4,
                )
                corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
                shades.setdefault(shade, []).extend(corners)
                begins = column + 1
    with blank(_WIDTH, 46 + height * len(rows)) as figure:
        axes = figure.add_subplot()
        axes.barh(range(len(rows)), edges[-1] - edges[0], left=edges[0], height=0.8, color=FAINT)
        for shade, corners in sorted(shades.items()):
            if shade:
                codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY] * (len(corners) // 5)
                axes.add_patch(
                    PathPatch(Path(corners, codes), facecolor=ink(0), edgecolor="none", alpha=shade)
                )
        axes.set_yticks(
            range(0, len(rows), apart),
            [_short(name, 26) for name, _ in rows[::apart]],
            fontsize=9.5,
        )
        axes.tick_params(axis="y", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel(x_label)
        return as_svg(figure, label)


def graph(
    edges_by_round: Sequence[Sequence[tuple[int, int]]],
    names: Sequence[str],
    *,
    label: str,
    standalone: bool = False,
) -> str:
    """The peers on a circle, and a line between those who exchange: a panel for each round up to 6
    rounds, else one, coloured by round. `edges_by_round` is one period of the topology.
    Of more than 3,000 lines every second, third, ... is drawn, and the picture says so.
    `standalone` gives a whole SVG file with colours and a background.
    """
    rounds = len(edges_by_round)
    left_out = math.ceil(sum(map(len, edges_by_round)) / _MOST_LINES)
    panels = rounds if rounds <= _MOST_PANELS else 1
    columns = panels if panels <= 2 else (2 if panels == 4 else 3)
    # One panel has room for names, several for the peers' numbers, many peers for neither.
    texts = [_short(name, 12) if panels == 1 else str(index) for index, name in enumerate(names)]
    texts = texts if len(names) <= MOST_NAMES else [""] * len(names)
    longest, text_size = max(map(len, texts), default=0), 11 if panels == 1 else 10.5
    # A name of n letters, each about 0.6 of its size wide, must fit between the circle and the edge
    # of its panel.
    reach = 1.14 / (1 - min(0.6, 1.2 * text_size * longest * columns / _WIDTH))
    tall = 1.16 + 0.06 * columns
    height = _WIDTH / columns * (tall / reach) + (24 if panels > 1 else 0)
    with blank(
        _WIDTH, height * math.ceil(panels / columns) + (40 if rounds > _MOST_PANELS else 0)
    ) as figure:
        for panel in range(panels):
            axes = figure.add_subplot(math.ceil(panels / columns), columns, panel + 1)
            axes.set_xlim(-reach, reach)
            axes.set_ylim(-tall, tall)
            axes.set_aspect("equal")
            axes.set_axis_off()
            shown = range(rounds) if panels == 1 else [panel]
            for number in shown:
                drawn = edges_by_round[number][:: max(1, left_out)]
                _draw_edges(axes, drawn, len(names), number if rounds > _MOST_PANELS else 0)
            if left_out > 1 and panel == panels - 1:
                text = f"one line of {left_out} is drawn"
                axes.text(0, -tall, text, ha="center", va="bottom", fontsize=text_size)
            _draw_peers(axes, texts, text_size, columns)
            if panels > 1:
                axes.set_title(f"round {panel}, {panel + rounds}, …", fontsize=11)
        if rounds > _MOST_PANELS:
            handles = [
                axes.plot([], [], color=ink(number), linestyle=_DASHES[number // len(PALETTE) % 4])[
                    0
                ]
                for number in range(rounds)
            ]
            _legend(figure, handles, [f"round {number}" for number in range(rounds)], columns=4)
        return as_svg(figure, label, standalone)


def _draw(axes: Axes, one: Series) -> None:
    colour, few = ink(one.colour), len(one.x) <= 60
    y = [math.nan if value is None else value for value in one.y]
    low, high = (
        [math.nan if value is None else value for value in edge] if edge else y
        for edge in (one.low, one.high)
    )
    if one.points_only:
        below, above = ([abs(a - b) for a, b in zip(y, edge, strict=True)] for edge in (low, high))
        axes.errorbar(
            one.x,
            y,
            yerr=[below, above],
            fmt="D",
            color=colour,
            markersize=5,
            markerfacecolor=PAPER,
            markeredgewidth=1.4,
            elinewidth=1.2,
            capsize=3,
            label=one.name,
            zorder=3,
        )
        return
    if one.low and one.high:
        axes.fill_between(one.x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(
        one.x,
        y,
        color=colour,
        linestyle=_DASHES[one.dash],
        linewidth=2.4 if one.main else 1.8,
        label=one.name,
        marker="o" if few and one.main else "",
        markersize=4,
        zorder=4 if one.main else 2,
    )


def _draw_edges(axes: Axes, edges: Sequence[tuple[int, int]], peers: int, number: int) -> None:
    from matplotlib.collections import LineCollection

    segments = [[_place(first, peers), _place(second, peers)] for first, second in edges]
    width = 1.6 if len(edges) <= 60 else 0.8
    axes.add_collection(
        LineCollection(
            segments,
            colors=ink(number),
            linewidths=width,
            alpha=0.75,
            linestyles=[_DASHES[number // len(PALETTE) % 4]],
        )
    )


def _draw_peers(axes: Axes, texts: Sequence[str], text_size: float, columns: int) -> None:
    apart = math.ceil(len(texts) / _MOST_DOTS)
    places = [_place(index, len(texts)) for index in range(0, len(texts), max(1, apart))]
    texts = texts[:: max(1, apart)]
    size = max(6, min(70, 1400 / max(1, len(texts)))) / columns
    axes.scatter(
        [x for x, _ in places],
        [y for _, y in places],
        s=size,
        color=INK,
        edgecolors=PAPER,
        linewidths=1,
        zorder=3,
    )
    for (x, y), text in zip(places, texts, strict=True):
        across = "center" if abs(x) < 0.2 else "left" if x > 0 else "right"
        axes.text(
            1.09 * x, (1.1 + 0.04 * columns) * y, text, ha=across, va="center", fontsize=text_size
        )


def _place(index: int, peers: int) -> tuple[float, float]:
    """Clockwise from the top, as on a clock."""
    angle = math.pi / 2 - 2 * math.pi * index / peers
    return math.cos(angle), math.sin(angle)


def _legend(
    figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int = 0
) -> None:
    longest = max((len(label) for label in labels), default=0)
    columns = columns or max(1, min(4, len(labels), int(_WIDTH / (7 * longest + 40))))
    # matplotlib leaves out a label that starts with an underscore: a space of no width in front
    # keeps it.
    labels = ["\u200b" + label if label.startswith("_") else label for label in labels]
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        borderaxespad=0,
        handlelength=2,
        columnspacing=1.4,
    )


def _power_text(value: float, _tick: float = 0) -> str:
    """A tick of a log axis: 0.01, 1, 100 as they are, smaller and larger as a power of ten."""
    if 1e-3 <= value <= 1e4:
        return f"{value:g}"
    digits, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digits == "1" else f"{digits}·{power}"


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
