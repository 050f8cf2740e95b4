"""matplotlib's figures as SVG, in the colours of the page that shows them."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe hues, each dark enough for a line on white. On the page they are
# CSS variables, so that dark mode can lighten them: matplotlib draws with a stand-in colour, which
# is then replaced.
PALETTE = ("#0072b2", "#c98500", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#d9cc2e", "#8a8f98")
INK, FAINT, PAPER = "#010101", "#020202", "#030303"
_ON_PAGE = {INK: "currentColor", FAINT: "var(--faint)", PAPER: "var(--paper)"} | {
    f"#0{number}0{number}ff": f"var(--c{number})" for number in range(len(PALETTE))
}
_ALONE = {INK: "#1c2430", FAINT: "#d5dae1", PAPER: "#ffffff"} | {
    f"#0{number}0{number}ff": colour for number, colour in enumerate(PALETTE)
}


def ink(number: int) -> str:
    """The stand-in for a colour of the palette, by its number."""
    number %= len(PALETTE)
    return f"#0{number}0{number}ff"


@contextmanager
def blank(width: float, height: float) -> Iterator[Figure]:
    """A figure of that many user units under our own settings, whatever the user's matplotlibrc
    says; no window.
    """
    import matplotlib
    import matplotlib.style
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    off = ("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset", "text.parse_math")
    ours: dict[str, Any] = dict.fromkeys(inked, INK) | dict.fromkeys(off, False)
    ours |= {
        "font.size": 12,
        "legend.fontsize": 11,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "svg.fonttype": "none",
    }
    with matplotlib.style.context(["default", ours]), warnings.catch_warnings():
        # the reader's fonts draw the text, not ours
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")


def as_svg(figure: Figure, label: str, standalone: bool = False) -> str:
    """matplotlib's SVG without its fonts and colours, with ids unique to this picture and a name
    for screen readers.
    """
    import matplotlib

    # within `blank`'s context; pictures on one page share no ids
    matplotlib.rcParams["svg.hashsalt"] = label
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    text = buffer.getvalue()
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size, "matplotlib wrote an SVG without a viewBox"
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r'<(g|text|use) id="[^"]*"', r"<\1", body)
    body = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", body, flags=re.S
    )
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"\n\s*", "\n", body)
    for stand_in, colour in (_ALONE if standalone else _ON_PAGE).items():
        body = body.replace(f": {stand_in}", f": {colour}")
    shape = f'viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{html.escape(label)}"'
    if not standalone:
        return f"<svg {shape}>{body.replace('xlink:href', 'href')}".strip()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size[1]}" height="{size[2]}" {shape} font-family="system-ui, sans-serif">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{body}'
    )
