"""A batch cut into parts, and the frame that begins each."""

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
    """A batch of B rows and L columns on its way through the body."""

    embedded: Tensor  # (B, L, E)
    mask: Tensor  # (B, L) bool: real tokens
    # (B, L) bool: whose final hidden states the head reads; None: the pooled output (B, H)
    needed: Tensor | None
    token_types: Tensor | None  # (B, L)
    positions: Tensor | None  # (B, L)
    seed: int | None  # of all dropout; None: none
    # that were bound at the forward, in the order of ``Adapter.tensors``
    factors: Sequence[Tensor] = ()
    killed: frozenset[int] = frozenset()  # groups for which the device is not asked
    packed: bool = False  # as in `Begin`


def row_ranges(num_rows: int, count: int) -> list[range]:
    """``count`` runs of rows, as equal as they come."""
    edges = [round(part * num_rows / count) for part in range(count + 1)]
    return [
        range(first, last) for first, last in zip(edges, edges[1:], strict=False) if last > first
    ]


def begin_of(
    request: Request, rows: range, call: int, part: int, keep: bool, units: tuple[int, ...] = ()
) -> Begin:
    """The part of these rows, without the columns in which none of them has a token."""
    mask = request.mask[rows.start : rows.stop]
    columns = int(mask.any(dim=0).nonzero().max()) + 1
    mask = mask[:, :columns]

    def own(tensor: Tensor) -> Tensor:
        """The real tokens of the part."""
        return tensor[rows.start : rows.stop, :columns][mask]

    return Begin(
        call=call,
        part=part,
        rows=len(rows),
        columns=columns,
        mask=_packed(mask),
        needed=b"" if request.needed is None else _packed(own(request.needed)),
        keep=keep,
        # of the rows, not of the part's number: they may go through again alone
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
