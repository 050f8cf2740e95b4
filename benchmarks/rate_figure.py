"""The figure of `rate.py`: panels with logarithmic axes, in the project's colours, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dlora.show.svg import FAINT, INK, PAPER, as_svg, blank, ink

COLUMNS = 2
WIDE, HIGH = 440, 400  # of a panel, in user units
LABEL = (
    "Six panels. The squared gradient norm against rounds, local steps and the spectral gap; the"
    " consensus error against the spectral gap and against its prediction."
)


Style = Literal["line", "dashed", "dots", "dashes"]  # dashes: no dots on them
_MARKS = {"line": "o", "dashed": "D", "dots": "o", "dashes": ""}
_LINES: dict[str, Any] = {"line": "-", "dashed": (0, (5, 2)), "dots": "", "dashes": (0, (5, 2))}


class Curve(NamedTuple):
    """Values at some x. Without a name it is not in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    style: Style


class Slope(NamedTuple):
    """A line of reference through the first point of a curve, over all x of the panel."""

    name: str
    curve: int
    power: float


class Panel(NamedTuple):
    """One of the figure."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    slopes: Sequence[Slope]


def tick_text(value: float, _tick: float = 0) -> str:
    """0.01, 1 and 100 as they are; what is smaller or larger as a power of ten."""
    if 1e-3 < value < 1e5:
        return f"{value:,g}"
    digits, power = f"{value:.0e}".split("e")
    raised = "10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return raised if digits == "1" else f"{digits}·{raised}"


def figure(panels: Sequence[Panel]) -> str:
    """A whole SVG file."""
    from matplotlib.ticker import LogLocator

    rows = -(-len(panels) // COLUMNS)
    with blank(WIDE * COLUMNS, HIGH * rows) as drawing:
        for number, panel in enumerate(panels):
            axes = drawing.add_subplot(rows, COLUMNS, number + 1)
            for one in panel.curves:
                axes.plot(
                    one.x,
                    one.y,
                    color=ink(one.colour),
                    linestyle=_LINES[one.style],
                    linewidth=1.8,
                    marker=_MARKS[one.style],
                    markersize=5,
                    markerfacecolor=PAPER if one.style == "dashed" else ink(one.colour),
                    label=one.name or "_",
                )
            reach = [end(one.x) for end in (min, max) for one in panel.curves]
            reach = [min(reach), max(reach)]
            for number_of_line, (name, curve, power) in enumerate(panel.slopes):
                x, y = panel.curves[curve].x[0], panel.curves[curve].y[0]
                axes.plot(
                    reach,
                    [y * (end / x) ** power for end in reach],
                    color=INK,
                    linestyle=((0, (1, 1.5)), (0, (6, 2, 1, 2)))[number_of_line],
                    linewidth=1.2,
                    label=name,
                    zorder=1.5,
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{'abcdef'[number]}  {panel.title}", loc="left", fontsize=12)
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(panel.y_label)
            axes.grid(color=FAINT, linewidth=0.8)
            for axis, (least, most) in (
                (axes.xaxis, axes.get_xlim()),
                (axes.yaxis, axes.get_ylim()),
            ):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 150 * least else (1,)))
                axis.set_major_formatter(tick_text)
                axis.set_minor_formatter("")
            axes.legend(
                frameon=False,
                fontsize=10,
                ncols=2,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.16),
            )
        return as_svg(drawing, LABEL, standalone=True)
