"""What cloud and device say to each other, frame by frame; how a frame travels is the wire's
business.

A *part* is a micro-batch: some rows of a batch, on their way through the body together. Rows of
every tensor are the part's real tokens, row after row, without padding (N of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

PROTOCOL = 2  # 2: `Begin.packed`

# int8: per token, with a float32 scale each
Wire: TypeAlias = Literal["float32", "bfloat16", "int8"]
What: TypeAlias = Literal[
    "input", "update", "hidden", "hidden-gradient", "update-gradient", "input-gradient"
]
Why: TypeAlias = Literal["memory", "tokens", "expired", "broken"]
WIRES, WHATS, WHYS = get_args(Wire), get_args(What), get_args(Why)

ACTIVE, LEFT_OUT, FIRST_VERSION = 0, 1, 2  # what `Begin.units` says of a group


@dataclass(frozen=True)
class Open:
    """Device: the first frame on each link; what both halves must agree on."""

    manifest: str  # canonical JSON


@dataclass(frozen=True)
class Opened:
    """Cloud: agreed. What it takes of one device."""

    max_tokens: int  # of all parts that are in the cloud at once
    max_parts: int


@dataclass(frozen=True)
class Refused:
    """Cloud: not agreed, or no room for one more device; the link ends."""

    reason: str  # one line: the key, both values, what to do
    later: bool = False  # it may be otherwise in a while


@dataclass(frozen=True, eq=False)
class Begin:
    """Device: send this part through the body.

    Its attributes are the fields of the frame.
    """

    call: int  # of the forward that it belongs to; a number is used once a session
    part: int
    rows: int
    columns: int  # tokens of a padded row
    mask: bytes  # attention mask, (rows x columns) bits, first bit highest, as numpy.packbits
    # which of the N tokens' final hidden states the head reads, N bits; empty: the pooled output
    needed: bytes
    keep: bool  # a backward will follow
    seed: int | None  # of the body's own dropout; None: no dropout
    token_types: bytes  # one a token, or empty
    positions: tuple[int, ...]  # one a token, or empty: the body counts
    # one a group: ACTIVE, LEFT_OUT, or the version that was handed off; empty: all are active
    units: tuple[int, ...]
    embedded: Tensor  # (N, hidden width)
    # no attention mask was given: where positions begin again within a row, another text begins
    packed: bool = False


@dataclass(frozen=True, eq=False)
class Values:
    """Either: numbers at one place of a part's way.

    down: ``input`` of a group of modules; ``hidden``, the body's output; ``update-gradient``, of
    the loss by an update. up: ``update`` of a group's modules, side by side; ``hidden-gradient``;
    ``input-gradient``, what the update adds to it.
    """

    what: What
    call: int
    part: int
    group: int  # 0 where there is none
    tensor: Tensor  # (tokens, width), float32 on both ends
    reply: bool = False  # update-gradient: an input-gradient is waited for


@dataclass(frozen=True, eq=False)
class HandOff:
    """Device: the factors of a killed group, for parts begun later; they take the place of an
    earlier version.
    """

    group: int
    version: int  # from 2 on
    # (1, numbers) float32 on every wire: the factors of each module, one after the other
    tensor: Tensor


@dataclass(frozen=True)
class Done:
    """Cloud: the backward of a part is through; nothing of it is left here."""

    call: int
    part: int


@dataclass(frozen=True)
class Failed:
    """Cloud: a part could not go on; nothing of it is left here."""

    call: int
    part: int
    why: Why
    text: str  # one line


@dataclass(frozen=True)
class Drop:
    """Device: forget all parts of a call."""

    call: int


SplitFrame: TypeAlias = Open | Opened | Refused | Begin | Values | HandOff | Done | Failed | Drop
