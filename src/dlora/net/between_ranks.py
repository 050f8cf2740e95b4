"""Messages between participants in different processes of one simulation: torch.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dlora.errors import RunError

Edge = tuple[int, int]

PIECE_BYTES = 1 << 22  # that travel while the next ones are packed


@contextlib.contextmanager
def one_may_end() -> Iterator[None]:
    """Raise RunError where torch says that another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunError(
            "another process of this run has ended; what was saved stands. torchrun starts all"
            " again if --max-restarts allows it; if not, start all with --resume"
            f" ({str(error).partition('.cc:')[2].partition('] ')[2].partition('. ')[0] or error})"
        ) from error


class BetweenRanks:
    """Carries messages between ranks that hold consecutive ``blocks`` of the participants.

    The messages for one rank are one buffer; a message that several participants there need is in
    it once. ``group``: of torch.distributed; it carries tensors on the CPU. ``bytes_sent``: what
    this rank has sent in all.
    """

    def __init__(
        self, blocks: Sequence[range], rank: int, group: dist.ProcessGroup, wire: torch.dtype
    ) -> None:
        self.blocks, self.rank, self.group, self.wire = blocks, rank, group, wire
        self.bytes_sent = 0
        self._buffers: dict[tuple[int, str], Tensor] = {}

    def carry(
        self,
        sent: Mapping[str, Tensor],
        edges: Sequence[Edge],
        names: Sequence[Collection[str]] | None,
    ) -> dict[str, tuple[Sequence[int], Tensor]]:
        """Send this rank's messages over the edges that leave it, and return those that come.

        ``sent``: (P, ...) tensors of the participants here. ``names``: for each participant of the
        run, the tensors of its message; None: all of ``sent``. For each tensor, the result has the
        senders and their rows (M, ...), which stay until the next call. Where all exchange with
        all, one row comes from nobody: the mean of all messages. Raises RunError if another rank
        has ended.
        """
        count = self.blocks[-1].stop
        if names is None and edges and len(edges) == count * (count - 1) // 2:
            return self._means(sent, count)
        ends = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
        both_ways = np.concatenate([ends, ends[:, ::-1]])
        own = self.blocks[self.rank]
        outgoing, incoming = dict[int, _Packed](), dict[int, _Packed]()
        for rank, block in enumerate(self.blocks):
            if rank == self.rank:
                continue
            leaving = both_ways[_within(both_ways[:, 0], own) & _within(both_ways[:, 1], block)]
            if not len(leaving):
                continue
            leave, come = np.unique(leaving[:, 0]), np.unique(leaving[:, 1])
            outgoing[rank] = _Packed(sent, leave, names, self._buffer(rank, "out"))
            incoming[rank] = _Packed(sent, come, names, self._buffer(rank, "in"))
            self.bytes_sent += outgoing[rank].buffer.nbytes
        with one_may_end():
            under_way = [
                dist.irecv(piece, rank, self.group)
                for rank, packed in incoming.items()
                for piece, _ in packed.pieces()
            ]
            for rank, packed in outgoing.items():
                for piece, held in packed.pieces():
                    packed.fill(held, sent, own.start)
                    under_way.append(dist.isend(piece, rank, self.group))
            for work in under_way:
                assert work is not None  # it is None outside of the group
                work.wait()
        return _joined([*incoming.values()], sent)

    def _buffer(self, rank: int, way: str) -> Callable[[int], Tensor]:
        """The buffer for one rank and one way, which is kept: fresh memory takes longer to get than
        to fill.
        """

        def of(numbers: int) -> Tensor:
            if len(self._buffers.get((rank, way), ())) < numbers:
                self._buffers[rank, way] = torch.empty(numbers, dtype=self.wire)
            return self._buffers[rank, way][:numbers]

        return of

    def _means(
        self, sent: Mapping[str, Tensor], count: int
    ) -> dict[str, tuple[Sequence[int], Tensor]]:
        """The mean over all ``count`` participants of each tensor, (1, ...)."""
        sums = torch.cat(
            [
                tensor.to(self.wire).to(tensor.dtype).sum(dim=0).flatten().cpu()
                for tensor in sent.values()
            ]
        )
        self.bytes_sent += sums.nbytes
        with one_may_end():
            dist.all_reduce(sums, group=self.group)
        parts = (sums / count).split([tensor[0].numel() for tensor in sent.values()])
        return {
            name: ((), part.view(1, *tensor.shape[1:]).to(tensor.device))
            for (name, tensor), part in zip(sent.items(), parts, strict=True)
        }


class _Packed:
    """The messages of some senders of one rank in one buffer, tensor after tensor."""

    def __init__(
        self,
        like: Mapping[str, Tensor],
        senders: np.ndarray,
        names: Sequence[Collection[str]] | None,
        buffer: Callable[[int], Tensor],
    ) -> None:
        self.senders = {name: _who_sent(name, senders, names) for name in like}
        sizes = [len(self.senders[name]) * tensor[0].numel() for name, tensor in like.items()]
        self.buffer = buffer(sum(sizes))
        self.rows = {
            name: part.view(-1, *tensor.shape[1:])
            for (name, tensor), part in zip(like.items(), self.buffer.split(sizes), strict=True)
        }

    def pieces(self) -> Iterator[tuple[Tensor, list[str]]]:
        """The buffer in pieces of about ``PIECE_BYTES``, and the tensors that each holds."""
        start = stop = 0
        held: list[str] = []
        for name, rows in self.rows.items():
            held.append(name)
            stop += rows.numel()
            if stop == len(self.buffer) or (stop - start) * rows.element_size() >= PIECE_BYTES:
                if start < stop:
                    yield self.buffer[start:stop], held
                start, held = stop, []

    def fill(self, names: Sequence[str], sent: Mapping[str, Tensor], first: int) -> None:
        """Copy these tensors' messages into the buffer; row 0 of ``sent`` is participant
        ``first``.
        """
        for name in names:
            into, tensor = self.rows[name], sent[name]
            rows = torch.from_numpy(self.senders[name] - first)
            if len(rows) == len(tensor):
                into.copy_(tensor)
            elif tensor.dtype == into.dtype and tensor.device == into.device:
                torch.index_select(tensor, 0, rows, out=into)
            else:
                into.copy_(tensor.index_select(0, rows.to(tensor.device)))


def _who_sent(
    name: str, senders: np.ndarray, names: Sequence[Collection[str]] | None
) -> np.ndarray:
    if names is None:
        return senders
    return senders[[name in names[sender] for sender in senders]]


def _joined(
    incoming: Sequence[_Packed], sent: Mapping[str, Tensor]
) -> dict[str, tuple[Sequence[int], Tensor]]:
    """For each tensor, the senders of all ranks and their rows, in the dtype that is mixed."""
    received: dict[str, tuple[Sequence[int], Tensor]] = {}
    for name, tensor in sent.items():
        parts = [one for one in incoming if len(one.senders[name])]
        if parts:
            rows = [one.rows[name].to(tensor.device, tensor.dtype) for one in parts]
            senders = np.concatenate([one.senders[name] for one in parts]).tolist()
            received[name] = (senders, rows[0] if len(rows) == 1 else torch.cat(rows))
    return received


def _within(peers: np.ndarray, block: range) -> np.ndarray:
    return (peers >= block.start) & (peers < block.stop)
