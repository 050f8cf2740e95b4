"""Which messages a run has, by name, and how their tensors become bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Messages:
    """The messages of a run; the program hands these functions in.

    ``sizes(message)``: the lengths in bytes that a message of that name can have; an empty range if
    no peer sends one. ``encode(message, tensors)``: its bytes. ``decode(message, path)``: the
    tensors of a file, (1, ...) each; raises ValueError if the file is not such a message.
    """

    sizes: Callable[[str], range]
    encode: Callable[[str, Mapping[str, Tensor]], bytes]
    decode: Callable[[str, Path], Mapping[str, Tensor]]
