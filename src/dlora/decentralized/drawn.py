"""Who takes part in a round: all peers, or a part of them that is drawn anew in each round."""

from __future__ import annotations

import random

from dlora.seeds import derive_seed


def drawn_count(participation: float, num_peers: int) -> int:
    """How many peers take part in a round: at least one."""
    return max(1, int(participation * num_peers + 0.5))


def drawn_peers(participation: float, num_peers: int, seed: int, round: int) -> list[int]:
    """The peers that take part in ``round``, in order: ``participation`` of all, at least one.

    All processes draw the same peers, because the draw follows from the seed and the round.
    """
    count = drawn_count(participation, num_peers)
    if count >= num_peers:
        return list(range(num_peers))
    draw = random.Random(derive_seed(seed, "participation", round))
    return sorted(draw.sample(range(num_peers), count))
