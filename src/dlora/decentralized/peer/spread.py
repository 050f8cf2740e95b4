"""How far apart this peer and its neighbours are, and what is too far from all that it has seen of
them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

FADES = 0.9  # what a round leaves of a larger difference seen before


def widened(
    spread: Mapping[str, float], own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> dict[str, float]:
    """``spread`` (tensor's name -> the largest difference to a neighbour's, as a norm) after one
    more message.
    """
    seen = {name: float((theirs[name] - own[name]).norm()) for name in own.keys() & theirs.keys()}
    return {**spread, **{name: max(spread.get(name, 0.0), value) for name, value in seen.items()}}


def faded(spread: Mapping[str, float]) -> dict[str, float]:
    """``spread`` a round later."""
    return {name: FADES * value for name, value in spread.items()}


def too_far(
    spread: Mapping[str, float],
    num_peers: int,
    own: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
) -> list[str]:
    """The names in which ``other``, said to be a mean of peers, cannot be one beside what this peer
    has seen.

    The bound is |other - own| <= |own| + num_peers * spread. A neighbour of a neighbour may be as
    far again, up to ``num_peers`` times; |own| allows for peers whose schedule has dropped the
    unit. A mean that was multiplied by -1 or by 3 is found where peers agree well, as in A; one
    multiplied by 1.5 is not. What no neighbour has sent is not judged.
    """
    far = []
    for name in sorted(spread.keys() & own.keys() & other.keys()):
        difference, size = float((other[name] - own[name]).norm()), float(own[name].norm())
        if size > 0 and difference > size + num_peers * spread[name]:
            far.append(name)
    return far
