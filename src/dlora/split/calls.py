"""The device's forwards and backwards through the cloud: cut into parts, gone through again when the cloud lost them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlora.errors import CloudError, RunError
from dlora.split.conversation import Adapter, Call, Channel, PartFailed, backward_on_device, forward_on_device
from dlora.split_frames import Begin, ChannelDown, Drop, Open, Opened, Refused

MAX_TRIES = 8  # of a part that is one row, when the cloud has no memory for it
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 8.0  # before the cloud is asked again


@dataclass(frozen=True)
class Request:
    """A batch of B rows and L columns on its way through the body."""

    embedded: Tensor  # (B, L, E)
    mask: Tensor  # (B, L) bool: real tokens
    needed: Tensor | None  # (B, L) bool: whose final hidden states the head reads; None: the pooled output (B, H)
    token_types: Tensor | None  # (B, L)
    positions: Tensor | None  # (B, L)
    seed: int | None  # of all dropout; None: none


@dataclass
class Sent:
    """A request that went through, and what its backward starts from."""

    request: Request
    ranges: list[range]  # the rows of each part
    call: Call | None  # what the cloud still holds; None: its parts go through again, one after the other
    channel: Channel | None


class Calls:
    """All that one device asks of its cloud, over as many links as it takes.

    ``dial`` waits for a link. ``wait`` is handed in, as all clocks are. The cloud holds nothing that cannot be made again:
    a call is repeated with the same numbers, dropout seed and factors, and its gradients count only when it is through.
    """

    def __init__(
        self,
        dial: Callable[[], Channel],
        manifest: str,
        adapter: Adapter,
        hidden_width: int,
        pipeline: int,
        wait: Callable[[float], None],
    ) -> None:
        self.dial, self.manifest, self.adapter, self.hidden_width = dial, manifest, adapter, hidden_width
        self.pipeline, self.wait = pipeline, wait
        self.repeated = 0  # calls that a lost link or a full cloud cost
        self._channel: Channel | None = None
        self._limits = Opened(1, 1)
        self._numbers = 0
        self._halvings = 0  # of the batch, because the cloud's memory was too small
        self._open: dict[int, int] = {}  # call -> its tokens, of those whose backward is to come

    def forward(self, request: Request, keep: bool) -> tuple[Sent, Tensor]:
        """What the head reads, (rows, H) with the real tokens or rows in order; ``keep``: a backward will follow."""
        tries = 0
        while True:
            try:
                channel = self._linked()
                ranges, together = self._cut(request)
                if together:
                    call = self._call(request, ranges, keep)
                    hidden = forward_on_device(channel, call, self.adapter)
                    if keep:
                        self._open[call.number] = int(request.mask.sum())
                    return Sent(request, ranges, call, channel), torch.cat(hidden)
                # Too much for the cloud at once: nothing stays there, and a backward goes through each part again.
                hidden = [forward_on_device(channel, self._call(request, [rows], False), self.adapter)[0] for rows in ranges]
                return Sent(request, ranges, None, None), torch.cat(hidden)
            except ChannelDown:
                self._lost()
            except PartFailed as failed:
                tries = self._shrink(failed, request, tries)

    def backward(self, sent: Sent, gradient: Tensor) -> list[Tensor | None]:
        """The gradients of the factors, in the order of ``adapter.tensors``, from that of what ``forward`` gave.

        Raises RunError when that is no number any more.
        """
        if not gradient.isfinite().all():
            raise RunError("the loss is no number any more; lower train.learning_rate and start anew in another output_dir")
        tries = 0
        while True:
            try:
                if sent.call is not None and sent.channel is self._channel and self._channel is not None:
                    return self._through(sent.call, gradient)
                sent.channel = self._linked()
                ranges, together = self._cut(sent.request)
                if len(ranges) > len(sent.ranges):
                    sent.ranges = ranges  # else the same parts, so that they draw the same dropout
                if together:
                    sent.call = self._call(sent.request, sent.ranges, keep=True)
                    forward_on_device(sent.channel, sent.call, self.adapter)
                    return self._through(sent.call, gradient)
                return self._one_by_one(sent, gradient)
            except ChannelDown:
                self._lost()
                sent.call = None
            except PartFailed as failed:
                sent.call = None
                tries = self._shrink(failed, sent.request, tries)

    def drop(self, sent: Sent) -> None:
        """Let the cloud forget a call whose backward will never come."""
        if sent.call is not None and self._open.pop(sent.call.number, None) is not None and sent.channel is self._channel:
            assert self._channel is not None
            try:
                self._channel.send(Drop(sent.call.number))
            except ChannelDown:
                self._lost()

    def _through(self, call: Call, gradient: Tensor) -> list[Tensor | None]:
        assert self._channel is not None
        parts = gradient.split([call.num_rows[part] for part in range(len(call.begins))])
        found = backward_on_device(self._channel, call, self.adapter, parts)
        self._open.pop(call.number, None)
        return found

    def _one_by_one(self, sent: Sent, gradient: Tensor) -> list[Tensor | None]:
        """Forward again and backward, part after part; the sum over parts is in their order."""
        assert self._channel is not None
        totals: list[Tensor | None] = [None] * len(self.adapter.tensors)
        begun = 0
        for rows in sent.ranges:
            call = self._call(sent.request, [rows], keep=True)
            forward_on_device(self._channel, call, self.adapter)
            own = gradient[begun : begun + call.num_rows[0]]
            begun += len(own)
            for place, found in enumerate(backward_on_device(self._channel, call, self.adapter, [own])):
                so_far = totals[place]
                totals[place] = found if so_far is None or found is None else so_far + found
        return totals

    # The link

    def _linked(self) -> Channel:
        """The link, made and opened if there is none."""
        while self._channel is None:
            channel = self.dial()
            try:
                channel.send(Open(self.manifest))
                answer = channel.receive()
            except ChannelDown:
                continue
            if isinstance(answer, Refused):
                raise CloudError(f"the cloud refuses this device: {answer.reason}")
            if not isinstance(answer, Opened):
                raise CloudError(f"the cloud answered {type(answer).__name__} instead of opening; is it another version?")
            self._channel, self._limits = channel, answer
        return self._channel

    def _lost(self) -> None:
        """The link is gone, and all that the cloud held for us with it."""
        self._channel = None
        self._open.clear()
        self.repeated += 1

    # Parts

    def _cut(self, request: Request) -> tuple[list[range], bool]:
        """The rows of each part, and whether all parts may be in the cloud at once."""
        lengths = request.mask.sum(dim=1).tolist()
        limit, num_rows = self._limits.max_tokens, len(lengths)
        if max(lengths) > limit:
            raise CloudError(
                f"a text of {max(lengths)} tokens; the cloud takes {limit} of one device at once: lower data.max_length, or"
                " raise limits.max_tokens there"
            )
        count = min(num_rows, self.pipeline * 2**self._halvings)
        ranges = _ranges(num_rows, count)
        held = sum(self._open.values())
        together = len(ranges) <= self._limits.max_parts and sum(lengths) + held <= limit and not self._halvings
        while any(sum(lengths[rows.start : rows.stop]) > limit for rows in ranges):
            count += 1
            ranges = _ranges(num_rows, count)
        return ranges, together

    def _shrink(self, failed: PartFailed, request: Request, tries: int) -> int:
        """After a failure: what is still there is dropped, and the next attempt takes less; returns the tries so far."""
        if self._channel is not None:
            self._channel.send(Drop(failed.call))
        self._open.pop(failed.call, None)
        self.repeated += 1
        if failed.why == "broken":
            raise CloudError(f"the cloud could not run the body: {failed}")
        if failed.why == "expired":
            return tries
        smallest = self.pipeline * 2**self._halvings >= len(request.mask)
        if smallest and tries >= MAX_TRIES:
            raise CloudError(
                f"the cloud has no room for one text of {int(request.mask.sum(1).max())} tokens ({failed}), asked"
                f" {tries} times: lower data.max_length, or raise limits there"
            )
        if not smallest:
            self._halvings += 1
        self.wait(min(FIRST_PAUSE_S * 2**tries, MAX_PAUSE_S))
        return tries + 1

    def _call(self, request: Request, ranges: Sequence[range], keep: bool) -> Call:
        self._numbers += 1
        begins = [_begin(request, rows, self._numbers, part, keep) for part, rows in enumerate(ranges)]
        return Call(self._numbers, begins, self.hidden_width)


def _ranges(num_rows: int, count: int) -> list[range]:
    """``count`` runs of rows, as equal as they come."""
    edges = [round(part * num_rows / count) for part in range(count + 1)]
    return [range(first, last) for first, last in zip(edges, edges[1:], strict=False) if last > first]


def _begin(request: Request, rows: range, call: int, part: int, keep: bool) -> Begin:
    """The part of these rows, without the columns in which none of them has a token."""
    mask = request.mask[rows.start : rows.stop]
    columns = int(mask.any(dim=0).nonzero().max()) + 1
    mask = mask[:, :columns]

    def own(tensor: Tensor) -> Tensor:
        """The real tokens of the part."""
        return tensor[rows.start : rows.stop, :columns][mask]

    return Begin(
        call=call,
        part=part,
        rows=len(rows),
        columns=columns,
        mask=_packed(mask),
        needed=b"" if request.needed is None else _packed(own(request.needed)),
        keep=keep,
        seed=request.seed,
        token_types=b"" if request.token_types is None else own(request.token_types).to(torch.uint8).numpy().tobytes(),
        positions=() if request.positions is None else tuple(own(request.positions).tolist()),
        embedded=own(request.embedded).detach().float().cpu(),
    )


def _packed(flags: Tensor) -> bytes:
    return np.packbits(flags.reshape(-1).numpy()).tobytes()

