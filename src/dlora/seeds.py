"""Derives the seed for each purpose from the run's one seed."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for ``purpose``, the same on every machine and in every process.

    Python's ``hash`` differs between processes.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
