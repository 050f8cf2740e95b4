"""Graphs, curves and bars as SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from dlora.show.drawing import Line, Series, curves, graph, stacked_bars
from dlora.show.svg import PALETTE


@pytest.mark.parametrize("period", [1, 3, 8])
def test_a_graph_that_stands_alone(period: int) -> None:
    edges = [[(0, 1), (1, 2)]] * period
    svg = ElementTree.fromstring(
        graph(
            edges, ["a<b", "b&c", "a very long name of a peer"], label='a "graph"', standalone=True
        )
    )
    assert svg.tag.endswith("}svg") and svg.get("aria-label") == 'a "graph"'
    whole = ElementTree.tostring(svg, encoding="unicode")
    # colours of its own
    assert "var(" not in whole and "currentColor" not in whole and "#0000ff" not in whole
    assert PALETTE[0] in whole
    texts = [
        "".join(element.itertext()) for element in svg.iter("{http://www.w3.org/2000/svg}text")
    ]
    assert ("a<b" in texts and "a very long…" in texts) if period != 3 else texts.count("0") == 3


def test_one_edge_is_one_line() -> None:
    def lines(edges: list[tuple[int, int]]) -> int:
        return len(
            re.findall(
                r"M [\d.]+ [\d.]+ \nL [\d.]+ [\d.]+ \n\"",
                graph([edges], ["a", "b", "c"], label="graph"),
            )
        )

    assert lines([(0, 1), (1, 2), (2, 0)]) - lines([(0, 1)]) == 2


def test_curves_leave_gaps_and_draw_lines_of_reference() -> None:
    series = Series(name="one", x=[0, 1, 2, 3], y=[1.0, None, 100.0, 1000.0], main=True)
    picture = curves(
        [series],
        "rounds",
        "loss",
        label="l",
        log_y=True,
        reference_lines=[Line(name="Pooled", y=10, colour=1)],
    )
    assert "Pooled" in picture and "var(--c1)" in picture
    assert len(re.findall(r"<use [^>]*var\(--c0\)", picture)) == 4  # three points and the legend's
    assert re.search(r">1000</text>", picture)


def test_bars_as_long_as_their_rows() -> None:
    picture = stacked_bars({"a": {"x": 30.0, "y": 10.0}, "b": {"y": 20.0}}, "rows", label="l")
    shapes = re.findall(
        r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*"[^>]*fill: var\(--c(\d)\)', picture
    )
    widths = {(colour, round(float(right) - float(left))) for left, right, colour in shapes}
    unit = max(width for colour, width in widths if colour == "0") / 30
    assert {
        round(width / unit) for colour, width in widths if colour == "1" and width > 5 * unit
    } >= {10, 20}


def test_many_lines_are_thinned_and_the_picture_says_so() -> None:
    peers = 10_000
    ring = [(peer, (peer + 1) % peers) for peer in range(peers)]
    picture = graph([ring], [str(peer) for peer in range(peers)], label="ring")
    assert "one line of 4 is drawn" in picture and len(picture) < 1_000_000
    assert 2500 <= len(re.findall(r"M [\d.]+ [\d.]+ \nL [\d.]+ [\d.]+ \n\"", picture)) <= 2510
    assert "is drawn" not in graph([ring[:3000]], ["a"] * peers, label="path")
