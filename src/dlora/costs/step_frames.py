"""The frames of one step of a split run in which nothing fails, without the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dlora.split.agreement import Agreement
from dlora.split.device.parts import Request, begin_of, row_ranges
from dlora.split.tensors import bits, factor_shapes
from dlora.wire.split.frames import ACTIVE, FIRST_VERSION, Done, HandOff, SplitFrame, Values

# a call's number as it is long into a run: a frame grows by a byte for every 7 bits of it
FAR = 1 << 13


def frames_of(
    request: Request,
    agreement: Agreement,
    widths: tuple[int, int],
    pipeline: int,
    keep: bool,
    units: tuple[int, ...] = (),
) -> Iterator[SplitFrame]:
    """The frames up and down for a batch whose ``embedded`` is a placeholder (B, L, 1). ``widths``:
    of the embedded tokens and of the hidden states. ``units``: as in `Begin`.
    """
    active = [
        number for number in range(len(agreement.units)) if not units or units[number] == ACTIVE
    ]
    embedding_width, hidden_width = widths
    ranges = row_ranges(len(request.mask), min(len(request.mask), pipeline))
    for part, rows in enumerate(ranges):
        begin = begin_of(request, rows, FAR, part, keep, units)
        num_tokens = len(begin.embedded)
        read = int(bits(begin.needed, num_tokens).sum()) if begin.needed else begin.rows
        yield replace(begin, embedded=_numberless(num_tokens, embedding_width))
        yield Values("hidden", FAR, part, 0, _numberless(read, hidden_width))
        if keep:
            yield Values("hidden-gradient", FAR, part, 0, _numberless(read, hidden_width))
            yield Done(FAR, part)
        for number in active:
            unit = agreement.units[number]
            rows_in = begin.rows if unit.modules[0].startswith("pooler.") else num_tokens
            x, update = _numberless(rows_in, unit.in_features), _numberless(rows_in, unit.width)
            yield Values("input", FAR, part, number, x)
            yield Values("update", FAR, part, number, update)
            if keep:
                yield Values("update-gradient", FAR, part, number, update, reply=number > active[0])
                if number > active[0]:  # below the lowest active unit nothing trains
                    yield Values("input-gradient", FAR, part, number, x)


def hand_off_of(agreement: Agreement, number: int) -> HandOff:
    """The hand-off of one unit: its frame is as long as that of any version near the first."""
    shapes = factor_shapes(agreement.units[number], agreement)
    numbers = sum(math.prod(shape) for own in shapes for shape in own)
    return HandOff(number, FIRST_VERSION, _numberless(1, numbers))


def _numberless(rows: int, width: int) -> Tensor:
    return torch.empty(rows, width, device="meta")
