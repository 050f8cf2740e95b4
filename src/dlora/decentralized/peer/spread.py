"""How far this peer and its neighbours are apart, and which mean is too far from both."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

FADES = 0.9  # factor by which each round reduces a difference seen before


def widened(spread: Mapping[str, float], apart: Mapping[str, float]) -> dict[str, float]:
    """``spread`` after one more edge, whose ends are ``apart``.

    Both are tensor name -> norm of the difference to a neighbour's tensor; ``spread`` has the
    largest.
    """
    return {**spread, **{name: max(spread.get(name, 0.0), value) for name, value in apart.items()}}


def faded(spread: Mapping[str, float]) -> dict[str, float]:
    """``spread`` one round later."""
    return {name: FADES * value for name, value in spread.items()}


def too_far(
    spread: Mapping[str, float],
    num_peers: int,
    own: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
) -> list[str]:
    """The names of the tensors in which ``other`` cannot be the mean of peers that it is said to
    be.

    The bound is |other - own| <= |own| + num_peers * spread. A neighbour of a neighbour may be as
    far away again, up to ``num_peers`` times; |own| allows for peers whose schedule has dropped the
    unit. Where peers agree well, as in A, a mean multiplied by -1 or by 3 is found; a mean
    multiplied by 1.5 is not. A tensor that no neighbour has sent is not judged.
    """
    far = []
    for name in sorted(spread.keys() & own.keys() & other.keys()):
        difference, size = float((other[name] - own[name]).norm()), float(own[name].norm())
        if size > 0 and difference > size + num_peers * spread[name]:
            far.append(name)
    return far
