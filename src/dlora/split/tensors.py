"""What both halves do with tensors: a module's share of a group, factors applied, packed bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.lora.units import Unit


def shares(x: Tensor, group: Unit, core: bool) -> Sequence[Tensor]:
    """What each module of a group reads of ``x``: all of it, or under placement core its own r
    columns.
    """
    return torch.split(x, list(group.out_features), dim=-1) if core else [x] * len(group.modules)


def through(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """x A^T B^T, or x M^T."""
    for factor in factors:
        x = F.linear(x, factor)
    return x


def as_factors(handed_off: Tensor, group: Unit, r: int, core: bool) -> list[list[Tensor]] | None:
    """What `Adapter.handed_off` made flat, of each module: A (r, I) and B (O, r), or M (r, r);
    None: not of that size.
    """
    shapes = [
        [(r, r)] if core else [(r, group.in_features), (out, r)] for out in group.out_features
    ]
    sizes = [rows * columns for own in shapes for rows, columns in own]
    if handed_off.numel() != sum(sizes):
        return None
    flat = iter(torch.split(handed_off.flatten(), sizes))
    return [[next(flat).view(shape) for shape in own] for own in shapes]


def bits(packed: bytes, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(count,) booleans, as numpy.packbits packed them."""
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(bool)
