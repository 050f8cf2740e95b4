"""The wire of a simulation: it moves nothing and counts the bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dlora.wire.tensors import encode


class MemoryTransport:
    """Carries messages between participants stacked in one process.

    ``bytes_on_wire`` counts serialised messages, both directions. Messages that hold the same names
    have the same shapes and dtype, so one of them is serialised and stands for all; its length
    depends on nothing else.
    """

    def __init__(self, wire: torch.dtype = torch.float32, bytes_on_wire: int = 0) -> None:
        self.wire = wire
        self.bytes_on_wire = bytes_on_wire
        self._message_bytes: dict[tuple[str, ...], int] = {}

    def exchange(
        self,
        round: int,
        sent: Mapping[str, Tensor],
        edges: Sequence[tuple[int, int]],
        names: Sequence[Collection[str]] | None = None,
    ) -> Sequence[tuple[int, int]]:
        """Every edge is committed; the messages of both its ends went over it, each with what
        ``names`` lets it hold.
        """
        for edge in edges:
            for end in edge:
                held = tuple(name for name in sent if names is None or name in names[end])
                if held not in self._message_bytes:
                    self._message_bytes[held] = len(
                        encode({name: sent[name][0] for name in held}, self.wire)
                    )
                self.bytes_on_wire += self._message_bytes[held]
        return edges
