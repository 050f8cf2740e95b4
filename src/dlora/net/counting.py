"""The transport of a simulation: it sends nothing and counts the bytes that peers would send."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dlora.wire.tensors import message_num_bytes


class MemoryTransport:
    """Counts the messages between participants that are stacked in one process.

    ``bytes_on_wire`` is the number of bytes of all serialised messages in both directions. Messages
    with the same names have the same shapes and dtype, and so the same length.
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
        """Count the messages of one round and return all ``edges``, because all are committed.

        Each end of an edge sends one message. ``names[p]``: the tensors that participant p sends;
        None: all of ``sent``.
        """
        if names is None:
            self.bytes_on_wire += 2 * len(edges) * self._num_bytes(tuple(sent), sent)
            return edges
        for end in (end for edge in edges for end in edge):
            held = tuple(name for name in sent if name in names[end])
            self.bytes_on_wire += self._num_bytes(held, sent)
        return edges

    def _num_bytes(self, held: tuple[str, ...], sent: Mapping[str, Tensor]) -> int:
        if held not in self._message_bytes:
            self._message_bytes[held] = message_num_bytes(
                {name: (self.wire, tuple(sent[name].shape[1:])) for name in held}
            )
        return self._message_bytes[held]
