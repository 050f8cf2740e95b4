"""What the messages of a run hold, by their names, as the program that runs it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Messages:
    """``sizes(message)``: the lengths in bytes that a message of that name can have; none where no
    peer sends one. ``encode(message, tensors)``: its bytes. ``decode(message, path)``: the tensors
    of a file, (1, ...) each; raises ValueError where it is not such a message.
    """

    sizes: Callable[[str], range]
    encode: Callable[[str, Mapping[str, Tensor]], bytes]
    decode: Callable[[str, Path], Mapping[str, Tensor]]
