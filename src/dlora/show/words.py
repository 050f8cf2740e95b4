"""Numbers as people read them: scores, bytes, seconds, counts."""

from __future__ import annotations

from collections.abc import Mapping

from dlora.config.tasks import score_of

BYTE_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
NBSP = "\u00a0"  # keeps a number and its unit on one line


def score_text(value: float | None, key: str) -> str:
    """A score as people write it: fractions such as accuracy in per cent, others as they are, a
    dash for none.
    """
    if value is None:
        return "–"
    if score_of(key).is_fraction:
        return percent_text(value)
    if key != "perplexity":
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def error_text(error: float | None, key: str) -> str:
    """The standard error behind the mean score of a sample: (s.e. 0.4), in points for fractions.
    Empty where all peers were scored.
    """
    if error is None:
        return ""
    return (
        f" (s.e.{NBSP}{100 * error:.1f})"
        if score_of(key).is_fraction
        else f" (s.e.{NBSP}{error:.2g})"
    )


def percent_text(fraction: float) -> str:
    """A fraction in per cent: 12.4 %."""
    return f"{100 * fraction:.1f}{NBSP}%"


def count_text(count: float) -> str:
    """A mean of counts: 2,000 or 312; below a hundred with one digit behind the point, 7.5."""
    return f"{count:,.0f}" if count >= 100 or count == round(count) else f"{count:.3g}"


def several_text(count: int, thing: str) -> str:
    """How many things there are: 1 peer, 2,000 peers."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def bytes_text(count: float | None) -> str:
    """A number of bytes in units of 1000: 12 B, 3.4 kB, 5.6 MB."""
    if count is None:
        return "–"
    unit, factor = unit_of(count, BYTE_UNITS)
    return (
        f"{count / factor:.0f}{NBSP}{unit}"
        if unit == "B" or count / factor >= 100
        else f"{count / factor:.1f}{NBSP}{unit}"
    )


def seconds_text(seconds: float | None) -> str:
    """A duration in its two largest units: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def unit_of(value: float, units: Mapping[str, float]) -> tuple[str, float]:
    """The largest unit that the value fills at least once, else the first."""
    return next(
        ((name, size) for name, size in reversed([*units.items()]) if value >= size),
        next(iter(units.items())),
    )
