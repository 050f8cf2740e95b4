"""A wire inside one process: every exchange succeeds, and is counted as the bytes it would have sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dlora.net.codec import encode


class MemoryTransport:
    """Carries messages between participants stacked in one process.

    ``bytes_on_wire`` counts serialised messages, both directions. All participants' messages of a round have the same
    names, shapes and dtype, so one of them is serialised and stands for all; its length depends on nothing else.
    """

    def __init__(self, wire: torch.dtype = torch.float32, bytes_on_wire: int = 0) -> None:
        self.wire = wire
        self.bytes_on_wire = bytes_on_wire
        self._message_bytes: dict[tuple[str, ...], int] = {}

    def exchange(self, round: int, sent: Mapping[str, Tensor], edges: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """Every edge is committed; two messages went over each."""
        names = tuple(sent)
        if names not in self._message_bytes:
            self._message_bytes[names] = len(encode({name: tensor[0] for name, tensor in sent.items()}, self.wire))
        self.bytes_on_wire += 2 * len(edges) * self._message_bytes[names]
        return edges
