"""What both halves do with tensors: split a unit's input, apply factors, unpack bits.

A unit is the modules that share one input. r is the rank of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.lora.units import Unit


def shares(x: Tensor, unit: Unit, core: bool) -> Sequence[Tensor]:
    """The part of a unit's input ``x`` that each of its modules reads.

    Placement literal: every module reads all of ``x``, (..., in_features). Placement core: ``x`` is
    (..., modules x r), and each module reads r columns of its own.
    """
    return torch.split(x, list(unit.out_features), dim=-1) if core else [x] * len(unit.modules)


def through(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Apply the factors to ``x`` one after the other: x A^T B^T, or x M^T under placement core."""
    for factor in factors:
        x = F.linear(x, factor)
    return x


def as_factors(handed_off: Tensor, unit: Unit, core: bool) -> list[list[Tensor]] | None:
    """Undo `Adapter.handed_off`: the flat numbers as factors, one list for each module of the
    unit.

    A list holds A (r, in_features) and B (out_features, r), or M (r, r) under ``core``. Returns
    None if ``handed_off`` has another number of values.
    """
    shapes = [
        [(r, r)] if core else [(r, unit.in_features), (out, r)]
        for r, out in zip(unit.ranks, unit.out_features, strict=True)
    ]
    sizes = [rows * columns for own in shapes for rows, columns in own]
    if handed_off.numel() != sum(sizes):
        return None
    flat = iter(torch.split(handed_off.flatten(), sizes))
    return [[next(flat).view(shape) for shape in own] for own in shapes]


def bits(packed: bytes, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Unpack ``count`` bits that numpy.packbits packed: (count,) booleans."""
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(bool)
