"""Messages between participants in different processes of one simulation: torch.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dlora.errors import RunError

Edge = tuple[int, int]


@contextlib.contextmanager
def one_may_end() -> Iterator[None]:
    """Raise RunError where torch says that another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"another process of this run has ended ({str(error).splitlines()[0][:120]}); what was"
            " saved stands: start all again with --resume, or give torchrun --max-restarts"
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

    def carry(
        self,
        sent: Mapping[str, Tensor],
        edges: Sequence[Edge],
        names: Sequence[Collection[str]] | None,
    ) -> dict[str, tuple[Sequence[int], Tensor]]:
        """Send this rank's messages over the edges that leave it, and return those that come.

        ``sent``: (P, ...) tensors of the participants here. ``names``: for each participant of the
        run, the tensors of its message; None: all of ``sent``. For each tensor, the result has the
        senders and their rows (M, ...). Where all exchange with all, one row comes from nobody: the
        mean of all messages. Raises RunError if another rank has ended.
        """
        count = self.blocks[-1].stop
        if names is None and edges and len(edges) == count * (count - 1) // 2:
            return self._means(sent, count)
        ends = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
        both_ways = np.concatenate([ends, ends[:, ::-1]])
        own = self.blocks[self.rank]
        outgoing, incoming, operations = {}, {}, []
        for rank, block in enumerate(self.blocks):
            if rank == self.rank:
                continue
            leaving = both_ways[_within(both_ways[:, 0], own) & _within(both_ways[:, 1], block)]
            if not len(leaving):
                continue
            outgoing[rank] = _pack(sent, np.unique(leaving[:, 0]), names, own.start, self.wire)
            incoming[rank] = _Incoming(sent, np.unique(leaving[:, 1]), names, self.wire)
            self.bytes_sent += outgoing[rank].nbytes
            operations += [
                dist.P2POp(dist.isend, outgoing[rank], rank, self.group),
                dist.P2POp(dist.irecv, incoming[rank].buffer, rank, self.group),
            ]
        with one_may_end():
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
        return _joined(list(incoming.values()), sent)

    def _means(
        self, sent: Mapping[str, Tensor], count: int
    ) -> dict[str, tuple[Sequence[int], Tensor]]:
        """The mean over all ``count`` participants of each tensor, (1, ...)."""
        sums = torch.cat([tensor.sum(dim=0).flatten().cpu() for tensor in sent.values()])
        self.bytes_sent += sums.nbytes
        with one_may_end():
            dist.all_reduce(sums, group=self.group)
        parts = (sums / count).split([tensor[0].numel() for tensor in sent.values()])
        return {
            name: ((), part.view(1, *tensor.shape[1:]).to(tensor.device))
            for (name, tensor), part in zip(sent.items(), parts, strict=True)
        }


class _Incoming:
    """A buffer for the messages of some senders of one rank, tensor after tensor."""

    def __init__(
        self,
        like: Mapping[str, Tensor],
        senders: np.ndarray,
        names: Sequence[Collection[str]] | None,
        wire: torch.dtype,
    ) -> None:
        self.senders = {name: _who_sent(name, senders, names) for name in like}
        sizes = [len(self.senders[name]) * tensor[0].numel() for name, tensor in like.items()]
        self.buffer = torch.empty(sum(sizes), dtype=wire)
        self.rows = {
            name: part.view(-1, *tensor.shape[1:])
            for (name, tensor), part in zip(like.items(), self.buffer.split(sizes), strict=True)
        }


def _pack(
    sent: Mapping[str, Tensor],
    senders: np.ndarray,
    names: Sequence[Collection[str]] | None,
    first: int,
    wire: torch.dtype,
) -> Tensor:
    """The messages of ``senders``, tensor after tensor, as one buffer on the CPU."""
    packed = _Incoming(sent, senders, names, wire)
    for name, into in packed.rows.items():
        rows = torch.from_numpy(packed.senders[name] - first)
        if sent[name].dtype == wire and sent[name].device.type == "cpu":
            torch.index_select(sent[name], 0, rows, out=into)
        else:
            into.copy_(sent[name].index_select(0, rows.to(sent[name].device)))
    return packed.buffer


def _who_sent(
    name: str, senders: np.ndarray, names: Sequence[Collection[str]] | None
) -> np.ndarray:
    if names is None:
        return senders
    return senders[[name in names[sender] for sender in senders]]


def _joined(
    incoming: Sequence[_Incoming], sent: Mapping[str, Tensor]
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
