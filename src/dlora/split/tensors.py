"""What both halves do with tensors: split a unit's input, apply factors, unpack bits.

A unit is the modules that share one input. r is the rank of a module, or the width of its
bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.lora.layers import activate
from dlora.lora.units import Unit
from dlora.split.agreement import Agreement


def shares(x: Tensor, unit: Unit, core: bool) -> Sequence[Tensor]:
    """The part of a unit's input ``x`` that each of its modules reads.

    Placement literal: every module reads all of ``x``, (..., in_features). Placement core: ``x`` is
    (..., modules x r), and each module reads r columns of its own.
    """
    return torch.split(x, list(unit.out_features), dim=-1) if core else [x] * len(unit.modules)


def through(factors: Sequence[Tensor], x: Tensor, activation: str | None) -> Tensor:
    """Apply the factors to ``x`` one after the other: x A^T B^T, or x M^T under placement core, or
    act(x D^T + d) U^T + u with the ``activation`` of a bottleneck.
    """
    if activation is not None:
        down_weight, down_bias, up_weight, up_bias = factors
        z = F.linear(x, down_weight) + down_bias
        return F.linear(activate(activation, z), up_weight) + up_bias
    for factor in factors:
        x = F.linear(x, factor)
    return x


def factor_shapes(unit: Unit, agreement: Agreement) -> list[list[tuple[int, ...]]]:
    """The shapes of the factors of each module of the unit, one list for each.

    A list has A (r, in_features) and B (out_features, r), or M (r, r) under placement core, or the
    down and up of a bottleneck, each with its bias.
    """
    width = unit.in_features
    each = list(zip(unit.ranks, unit.out_features, strict=True))
    if agreement.directions is not None:
        return [[(r, r)] for r, _ in each]
    if agreement.activation is not None:
        return [[(r, width), (r,), (out, r), (out,)] for r, out in each]
    return [[(r, width), (out, r)] for r, out in each]


def as_factors(handed_off: Tensor, unit: Unit, agreement: Agreement) -> list[list[Tensor]] | None:
    """Undo `Adapter.handed_off`: the flat numbers as factors, one list for each module of the
    unit. Returns None if ``handed_off`` has another number of values than `factor_shapes`.
    """
    shapes = factor_shapes(unit, agreement)
    sizes = [math.prod(shape) for own in shapes for shape in own]
    if handed_off.numel() != sum(sizes):
        return None
    flat = iter(torch.split(handed_off.flatten(), sizes))
    return [[next(flat).view(shape) for shape in own] for own in shapes]


def bits(packed: bytes, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Unpack ``count`` bits that numpy.packbits packed: (count,) booleans."""
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(bool)
