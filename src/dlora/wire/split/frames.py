"""The frames that cloud and device send to each other, and what each means; codec.py writes them.

A *part* is a micro-batch: some rows of a batch that go through the body together. Every tensor has
one row for each real token of the part (N tokens), batch row after batch row, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

# version 2 added `Begin.packed`, version 3 a rank for each module and bottleneck adapters
PROTOCOL = 3

# int8: each token has its own float32 scale
Wire: TypeAlias = Literal["float32", "bfloat16", "int8"]
What: TypeAlias = Literal[
    "input", "update", "hidden", "hidden-gradient", "update-gradient", "input-gradient"
]
Why: TypeAlias = Literal["memory", "tokens", "expired", "broken"]
WIRES, WHATS, WHYS = get_args(Wire), get_args(What), get_args(Why)

ACTIVE, LEFT_OUT, FIRST_VERSION = 0, 1, 2  # the values in `Begin.units`


@dataclass(frozen=True)
class Open:
    """From the device: the first frame on each link. Both halves must agree on its manifest."""

    manifest: str  # canonical JSON


@dataclass(frozen=True)
class Opened:
    """From the cloud: it accepts the device, within these limits."""

    max_tokens: int  # tokens of all parts of the device that are in the cloud at once
    max_parts: int  # parts of the device that are in the cloud at once


@dataclass(frozen=True)
class Refused:
    """From the cloud: the manifests differ, or there is no room for one more device.

    The link ends.
    """

    reason: str  # one line: the key, both values, what to do
    later: bool = False  # whether a later attempt may be accepted


@dataclass(frozen=True, eq=False)
class Begin:
    """From the device: run the forward pass of the body on this part.

    Its attributes are the fields of the frame.
    """

    call: int  # number of the forward pass that it belongs to; each is used once in a session
    part: int
    rows: int
    columns: int  # tokens in a padded row
    # attention mask, (rows x columns) bits, highest bit first, as numpy.packbits writes it
    mask: bytes
    # N bits: the tokens whose final hidden states the head reads; empty: it reads the pooled output
    needed: bytes
    keep: bool  # whether a backward pass will follow
    seed: int | None  # seed of the body's own dropout; None: no dropout
    token_types: bytes  # one for each token, or empty
    positions: tuple[int, ...]  # one for each token; empty: the body numbers the tokens
    # for each unit: ACTIVE, LEFT_OUT, or the version that was handed off; empty: all are active
    units: tuple[int, ...]
    embedded: Tensor  # (N, hidden width)
    # whether rows hold several texts; no attention mask was given, and a text begins where the
    # positions in a row begin again
    packed: bool = False


@dataclass(frozen=True, eq=False)
class Values:
    """From either side: one tensor of a part's forward or backward pass.

    The cloud sends ``input`` (the input of a unit's modules; the output of a linear under a
    bottleneck), ``hidden`` (the body's output) and ``update-gradient`` (the gradient of the loss
    with respect to an update). The device sends
    ``update`` (the updates of a unit's modules, side by side), ``hidden-gradient``, and
    ``input-gradient`` (the part of the input's gradient that comes through the update).
    """

    what: What
    call: int
    part: int
    unit: int  # the number of the unit; 0 if the tensor belongs to no unit
    tensor: Tensor  # (tokens, width), float32 on both ends
    reply: bool = False  # update-gradient: the cloud waits for an input-gradient


@dataclass(frozen=True, eq=False)
class HandOff:
    """From the device: the factors of a killed unit, for parts that begin later.

    They replace an earlier version.
    """

    unit: int  # the number of the unit
    version: int  # at least FIRST_VERSION
    # (1, numbers), float32 for every wire dtype: the factors of each module, one after the other
    tensor: Tensor


@dataclass(frozen=True)
class Done:
    """From the cloud: the backward pass of a part is finished; the cloud keeps nothing of it."""

    call: int
    part: int


@dataclass(frozen=True)
class Failed:
    """From the cloud: a part failed, and the cloud keeps nothing of it."""

    call: int
    part: int
    why: Why
    text: str  # one line


@dataclass(frozen=True)
class Drop:
    """From the device: forget all parts of a call."""

    call: int


SplitFrame: TypeAlias = Open | Opened | Refused | Begin | Values | HandOff | Done | Failed | Drop
