"""A batch cut into parts, and the frame that begins each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlora.seeds import derive_seed
from dlora.wire.split.frames import Begin


@dataclass(frozen=True)
class Request:
    """A batch of B rows and L columns that goes through the body; E is the width of embedded
    tokens.
    """

    embedded: Tensor  # (B, L, E)
    mask: Tensor  # (B, L) bool: where real tokens are
    # (B, L) bool: the tokens whose final hidden states the head reads; None: the head reads the
    # pooled output (B, hidden width)
    needed: Tensor | None
    token_types: Tensor | None  # (B, L)
    positions: Tensor | None  # (B, L)
    seed: int | None  # seed of all dropout; None: no dropout
    # the factors at the time of the forward, in the order of ``Adapter.tensors``
    factors: Sequence[Tensor] = ()
    killed: frozenset[int] = frozenset()  # units that the cloud does not ask the device for
    packed: bool = False  # as `Begin.packed`


def row_ranges(num_rows: int, count: int) -> list[range]:
    """Cut ``num_rows`` rows into ``count`` ranges of nearly equal length; empty ranges are left
    out.
    """
    edges = [round(part * num_rows / count) for part in range(count + 1)]
    return [
        range(first, last) for first, last in zip(edges, edges[1:], strict=False) if last > first
    ]


def begin_of(
    request: Request, rows: range, call: int, part: int, keep: bool, units: tuple[int, ...] = ()
) -> Begin:
    """The Begin frame of these rows. Columns after the last real token of all these rows are left
    out.

    ``units``: as `Begin.units`.
    """
    mask = request.mask[rows.start : rows.stop]
    columns = int(mask.any(dim=0).nonzero().max()) + 1
    mask = mask[:, :columns]

    def own(tensor: Tensor) -> Tensor:
        """The values of the part's real tokens: (B, L, ...) -> (N, ...)."""
        return tensor[rows.start : rows.stop, :columns][mask]

    return Begin(
        call=call,
        part=part,
        rows=len(rows),
        columns=columns,
        mask=_packed(mask),
        needed=b"" if request.needed is None else _packed(own(request.needed)),
        keep=keep,
        # the seed follows the rows and not the part's number, because the rows may be sent again in
        # another call
        seed=None if request.seed is None else derive_seed(request.seed, "part", rows.start),
        token_types=b""
        if request.token_types is None
        else own(request.token_types).to(torch.uint8).numpy().tobytes(),
        positions=() if request.positions is None else tuple(own(request.positions).tolist()),
        units=units,
        embedded=own(request.embedded).detach().float().cpu(),
        packed=request.packed,
    )


def _packed(flags: Tensor) -> bytes:
    return np.packbits(flags.reshape(-1).numpy()).tobytes()
