"""Topologies that agree exactly after a finite number of rounds: hypercube and base-k.

Both are cycles of mixing matrices whose product is the mean of all peers. The cycle of a single
peer is empty.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import block_diag, eye_array, kron

from dlora.decentralized.matrices import Matrix, matrix_of
from dlora.errors import TopologyError


def hypercube(n: int) -> list[Matrix]:
    """In round t peers i and i XOR 2^t take their mean: log2(n) matrices of (n, n).

    Raises TopologyError if n is not a power of two.
    """
    if n & (n - 1):
        below = 1 << (n.bit_length() - 1)
        near = f"{below}, {2 * below}, or kind base-k, which takes any number"
        raise TopologyError(f"topology hypercube needs a power of two, got {n} peers; take {near}")
    return _hyper_hyper_cube(n, 1)


def base_k(n: int, k: int) -> list[Matrix]:
    """The Base-(k+1) Graph (Takezawa et al. 2023, arXiv 2305.11420, Algorithm 3): exact for any n,
    degree at most k.

    n = smooth * rest, where ``smooth`` holds all the factors up to k+1. First each of ``smooth``
    teams of ``rest`` peers agrees by itself; then peers at the same place in their teams agree. If
    Algorithm 2 alone needs fewer rounds, it is used. Returns the cycle: matrices of (n, n).
    """
    rest = n
    for factor in range(2, k + 2):
        while rest % factor == 0:
            rest //= factor
    smooth = n // rest
    teams_first = [kron(eye_array(smooth), mixing) for mixing in _simple_base(rest, k)]
    teams_first += [kron(mixing, eye_array(rest)) for mixing in _hyper_hyper_cube(smooth, k)]
    return min(teams_first, _simple_base(n, k), key=len)


def _hyper_hyper_cube(n: int, k: int) -> list[Matrix]:
    """The k-peer Hyper-Hypercube (Algorithm 1), for an n whose prime factors are all at most k+1.

    Peer numbers are written in a mixed radix. In each round, peers that differ only in one digit
    take their mean.
    """
    rounds, stride = list[Matrix](), 1
    for base in reversed(_fewest_factors(n, k + 1) or ()):
        mean = np.full((base, base), 1 / base)
        rounds.append(kron(eye_array(n // (stride * base)), kron(mean, eye_array(stride))))
        stride *= base
    return rounds


def _fewest_factors(n: int, largest: int) -> tuple[int, ...] | None:
    """Write n as a product of as few factors from 2 to ``largest`` as possible, in falling order.

    None if there is no such product.
    """
    if n == 1:
        return ()
    firsts = [factor for factor in range(2, min(n, largest) + 1) if n % factor == 0]
    found = [
        (first, *others)
        for first in firsts
        if (others := _fewest_factors(n // first, first)) is not None
    ]
    return min(found, key=len, default=None)


def _simple_base(n: int, k: int) -> list[Matrix]:
    """The Simple Base-(k+1) Graph (Algorithm 2): exact for any n, degree at most k.

    1. Write n in base k+1. The peers of one digit are a part: ``num_blocks`` blocks, each with a
    power of k+1 peers. Each part takes its own mean.

    2. Go through the parts, largest first. Every peer of the later parts meets one peer of each
    block of this part. With these weights, the mean of each block becomes the mean of all peers,
    and the mean of the later parts becomes it too.

    3. Each block then takes its mean, while the later parts still do step 2.
    """
    if _fewest_factors(n, k + 1) is not None:
        return _hyper_hyper_cube(n, k)
    parts = list(_digits(n, k + 1))
    whole = [_hyper_hyper_cube(num_blocks * block, k) for _, num_blocks, block in parts]
    blocks = [
        [kron(eye_array(num), mean) for mean in _hyper_hyper_cube(block, k)]
        for _, num, block in parts
    ]
    cycle: list[Matrix] = []
    # turn < 0: step 1; turn l >= 0: part l meets the later parts
    for turn in range(-len(whole[0]), 1 + len(blocks[0])):
        on_diagonal: list[Matrix] = []
        for place, (start, num_blocks, block) in enumerate(parts):
            if turn == place != len(parts) - 1:
                on_diagonal.append(_meet_later_parts(n - start, num_blocks, block, k))
                break
            # A part whose blocks have one peer has nothing to average in step 3. Its peers agree
            # already, and their mean does not change them.
            own = whole[place] if turn < 0 or block == 1 else blocks[place]
            rests = eye_array(num_blocks * block)
            on_diagonal.append(own[(turn - place - 1) % len(own)] if own else rests)
        cycle.append(block_diag(on_diagonal))
    return cycle


def _digits(n: int, base: int) -> Iterator[tuple[int, int, int]]:
    """The parts of n peers as (first peer, num_blocks, peers in a block), highest digit first;
    parts without peers are left out.
    """
    start = 0
    for block in (base**power for power in reversed(range(n.bit_length()))):
        if num_blocks := (n - start) // block:
            yield start, num_blocks, block
            start += num_blocks * block


def _meet_later_parts(n: int, num_blocks: int, block: int, k: int) -> Matrix:
    """Step 2 of Algorithm 2, among the n peers of the part and of those after it.

    Peers of the part that meet nobody take means of k+1 among themselves.
    """
    in_blocks = np.arange(num_blocks * block).reshape(num_blocks, block)
    # the peers of the lower digits, so fewer than one block has
    later = np.arange(num_blocks * block, n)
    weight = block / n
    meeting, unmet = in_blocks[:, : len(later)], in_blocks[:, len(later) :].ravel()
    kept = np.empty(n)
    kept[meeting], kept[later] = 1 - weight, 1 - num_blocks * weight
    ends = [np.column_stack([met, later]) for met in meeting]
    weights = [np.full(meeting.size, weight)]
    full = len(unmet) // (k + 1) * (k + 1)
    for groups in (unmet[:full].reshape(-1, k + 1), unmet[np.newaxis, full:]):
        share = 1 / max(1, groups.shape[1])
        kept[groups] = share
        one, other = np.triu_indices(groups.shape[1], 1)
        ends.append(np.column_stack([groups[:, one].ravel(), groups[:, other].ravel()]))
        weights.append(np.full(len(ends[-1]), share))
    return matrix_of(kept, np.concatenate(ends), np.concatenate(weights))
