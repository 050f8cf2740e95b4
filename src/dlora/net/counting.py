"""The transport of a simulation: it counts the bytes that peers would send, and sends only what
another process of the simulation needs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dlora.net.between_ranks import BetweenRanks
from dlora.wire.tensors import message_num_bytes


class MemoryTransport:
    """Counts the messages between the participants of a simulation.

    ``bytes_on_wire`` is the number of bytes of all serialised messages in both directions, between
    the participants of all processes. Messages with the same names have the same shapes and dtype,
    and so the same length. ``between``: carries what other processes need; None: there are none.
    """

    def __init__(
        self, wire: torch.dtype = torch.float32, between: BetweenRanks | None = None
    ) -> None:
        self.wire, self.between = wire, between
        self.bytes_on_wire = 0
        self._message_bytes: dict[tuple[str, ...], int] = {}

    def exchange(
        self,
        round: int,
        sent: Mapping[str, Tensor],
        edges: Sequence[tuple[int, int]],
        names: Sequence[Collection[str]] | None = None,
    ) -> tuple[Sequence[tuple[int, int]], dict[str, tuple[Sequence[int], Tensor]]]:
        """Count the messages of one round. Returns all ``edges``, because all are committed, and
        what came from other processes.

        Each end of an edge sends one message. ``names[p]``: the tensors that participant p sends;
        None: all of ``sent``.
        """
        received = {} if self.between is None else self.between.carry(sent, edges, names)
        if names is None:
            self.bytes_on_wire += 2 * len(edges) * self._num_bytes(tuple(sent), sent)
            return edges, received
        for end in (end for edge in edges for end in edge):
            held = tuple(name for name in sent if name in names[end])
            self.bytes_on_wire += self._num_bytes(held, sent)
        return edges, received

    def _num_bytes(self, held: tuple[str, ...], sent: Mapping[str, Tensor]) -> int:
        if held not in self._message_bytes:
            self._message_bytes[held] = message_num_bytes(
                {name: (self.wire, tuple(sent[name].shape[1:])) for name in held}
            )
        return self._message_bytes[held]
