"""Frames between a device and its cloud, as hypothesis draws them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dlora.wire.split.frames import (
    FIRST_VERSION,
    WHATS,
    WHYS,
    WIRES,
    Begin,
    Done,
    Drop,
    Failed,
    HandOff,
    Open,
    Opened,
    Refused,
    SplitFrame,
    Values,
    Wire,
)

each_wire = pytest.mark.parametrize("wire", WIRES)
numbers = st.integers(0, 2**53 - 1)
texts = st.text(st.characters(categories=["L", "N", "P"]), max_size=400)
wires: st.SearchStrategy[Wire] = st.sampled_from(WIRES)


@st.composite
def tensors(draw: st.DrawFn, rows: int | None = None) -> Tensor:
    """Random values of all magnitudes, zero rows and views among them."""
    rows = draw(st.integers(1, 9)) if rows is None else rows
    made = torch.randn(
        rows,
        draw(st.integers(1, 17)),
        generator=torch.Generator().manual_seed(draw(st.integers(0, 999))),
    )
    made *= 10.0 ** draw(st.integers(-42, 36)) * torch.randint(0, 2, (rows, 1))
    return made.t().contiguous().t() if draw(st.booleans()) else made


@st.composite
def begins(draw: st.DrawFn) -> Begin:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    packed = draw(st.booleans())
    some = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns).filter(any)
    bits = [True] * (rows * columns) if packed else draw(some)
    num_tokens = sum(bits)
    needed = draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    positions = st.lists(st.integers(0, 2**31 - 1), min_size=num_tokens, max_size=num_tokens).map(
        tuple
    )
    return Begin(
        call=draw(numbers),
        part=draw(numbers),
        rows=rows,
        columns=columns,
        mask=np.packbits(bits).tobytes(),
        needed=b"" if needed is None else np.packbits(needed).tobytes(),
        keep=draw(st.booleans()),
        seed=draw(st.none() | st.integers(0, 2**63 - 1)),
        token_types=draw(st.just(b"") | st.binary(min_size=num_tokens, max_size=num_tokens)),
        positions=draw(positions if packed else st.just(()) | positions),
        units=draw(st.lists(numbers, max_size=9).map(tuple)),
        embedded=draw(tensors(num_tokens)),
        packed=packed,
    )


frames: st.SearchStrategy[SplitFrame] = st.one_of(
    st.builds(Open, st.text(st.characters(codec="utf-8"))),
    st.builds(Opened, numbers, numbers),
    st.builds(Refused, texts),
    begins(),
    st.builds(Values, st.sampled_from(WHATS), numbers, numbers, numbers, tensors(), st.booleans()),
    st.builds(HandOff, numbers, numbers.map(lambda number: max(FIRST_VERSION, number)), tensors(1)),
    st.builds(Done, numbers, numbers),
    st.builds(Failed, numbers, numbers, st.sampled_from(WHYS), texts),
    st.builds(Drop, numbers),
)


def plain(frame: SplitFrame) -> tuple[object, ...]:
    """What can be compared: everything but the tensor's values."""
    fields = {
        name: tuple(value.shape) if isinstance(value, Tensor) else value
        for name, value in vars(frame).items()
    }
    return type(frame), fields


def tensor_of(frame: SplitFrame) -> Tensor | None:
    return (
        frame.embedded
        if isinstance(frame, Begin)
        else frame.tensor
        if isinstance(frame, Values | HandOff)
        else None
    )
