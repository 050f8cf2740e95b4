"""The device's forwards and backwards through the cloud: cut into parts, repeated when the cloud
lost them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dlora.errors import CloudError, RunError
from dlora.split.device.adapter import Adapter, Call, HandOffs
from dlora.split.device.parts import Request, begin_of, row_ranges
from dlora.split.device.step import Channel, PartFailed, backward_on_device, forward_on_device
from dlora.wire.frame import ChannelDown, Misbehaviour
from dlora.wire.split.frames import Drop, Failed, Open, Opened, Refused, SplitFrame

_T = TypeVar("_T")
# of a call for which the cloud has no memory, or which it frees before the device has answered
MAX_TRIES = 8
CALLS_TO_RECOVER = 100  # after so many without a shortage the cloud is asked for more again
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 8.0  # before the cloud is asked again


@dataclass
class Sent:
    """A request that went through, and what its backward starts from."""

    request: Request
    ranges: list[range]  # the rows of each part
    # what the cloud may still hold; None: its parts go through again, one after the other
    call: Call | None


class Calls:
    """All that one device asks of its cloud, over as many links as it takes.

    ``dial`` waits for a link; the ChannelDown that it raises ends a call. ``wait`` is handed in, as
    all clocks are. The cloud holds nothing that cannot be made again: a call is repeated with the
    same numbers, dropout seed and factors, and its gradients count only when it is through.

    It is one class because one call at a time may change any of its state.
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
        self.dial, self.manifest, self.adapter, self.hidden_width = (
            dial,
            manifest,
            adapter,
            hidden_width,
        )
        self.pipeline, self.wait = pipeline, wait
        self.repeated = 0  # calls that a lost link or a full cloud cost
        self._link: _Link | None = None
        self._limits = Opened(1, 1)
        self._hand_offs = HandOffs(adapter)
        self._numbers = 0
        self._halvings = 0  # of the batch, because the cloud's memory was too small
        self._calls_since = 0  # that went well since it was
        self._open: dict[int, Call] = {}  # what the cloud holds
        self._busy = threading.Lock()  # one call is under way at a time
        # calls whose backward will never come; the cloud is to be told
        self._thrown: deque[int] = deque()

    def forward(self, request: Request, keep: bool) -> tuple[Sent, Tensor]:
        """What the head reads, (rows, H) with the real tokens or rows in order; ``keep``: a
        backward will follow.
        """
        with self._conversation():
            return self._until_through(request, lambda link: self._forward(link, request, keep))

    def backward(self, sent: Sent, gradient: Tensor) -> list[Tensor | None]:
        """The gradients of the factors, in the order of ``adapter.tensors``, from that of what
        ``forward`` gave.

        Raises RunError when that is no number any more.
        """
        if not gradient.isfinite().all():
            raise RunError(
                "the loss is no number any more; lower train.learning_rate and start anew in"
                " another output_dir"
            )
        with self._conversation():
            return self._until_through(
                sent.request, lambda link: self._backward(link, sent, gradient)
            )

    def drop(self, sent: Sent) -> None:
        """Let the cloud forget a call whose backward will never come.

        At once, or at the end of the call under way: garbage is collected at any moment, and in any
        thread.
        """
        if sent.call is not None and sent.call.number in self._open:
            self._thrown.append(sent.call.number)
            if self._busy.acquire(blocking=False):
                try:
                    self._forget_thrown()
                finally:
                    self._busy.release()

    def _forward(self, link: _Link, request: Request, keep: bool) -> tuple[Sent, Tensor]:
        ranges, together = self._cut(request)
        self._make_room(request, ranges, together)
        if together:
            call = self._call(link, request, ranges, keep)
            return Sent(request, ranges, call), torch.cat(self._go(link, call))
        # Too much for the cloud at once: nothing stays there, and a backward goes through each part
        # again.
        hidden = [
            self._go(link, self._call(link, request, [rows], keep=False))[0] for rows in ranges
        ]
        return Sent(request, ranges, None), torch.cat(hidden)

    def _backward(self, link: _Link, sent: Sent, gradient: Tensor) -> list[Tensor | None]:
        if sent.call is None or sent.call.number not in self._open:
            before = sent.ranges
            sent.ranges, together = self._cut(sent.request, before)
            if sent.request.seed is not None and sent.ranges != before:
                # the masks follow the parts: the loss would be of one model, its gradient of
                # another
                raise CloudError(
                    "the cloud's memory ran short in the middle of a step with dropout; go on with"
                    " --resume, or lower train.per_device_train_batch_size"
                )
            self._make_room(sent.request, sent.ranges, together)
            if not together:
                return self._one_by_one(link, sent, gradient)
            sent.call = self._call(link, sent.request, sent.ranges, keep=True)
            self._go(link, sent.call)
        return self._come_back(link, sent.call, gradient)

    def _one_by_one(self, link: _Link, sent: Sent, gradient: Tensor) -> list[Tensor | None]:
        """Forward again and backward, part after part; the sum over parts is in their order."""
        totals: list[Tensor | None] = [None] * len(self.adapter.tensors)
        begun = 0
        for rows in sent.ranges:
            call = self._call(link, sent.request, [rows], keep=True)
            self._go(link, call)
            own = gradient[begun : begun + call.num_rows[0]]
            begun += len(own)
            for place, found in enumerate(self._come_back(link, call, own)):
                so_far = totals[place]
                totals[place] = found if so_far is None or found is None else so_far + found
        return totals

    # One call

    def _go(self, link: _Link, call: Call) -> list[Tensor]:
        """Forward; returns each part's hidden."""
        self._open[call.number] = call
        with self._forgotten_if_broken_off(call):
            hidden = forward_on_device(link, call, self.adapter)
        if not call.begins[0].keep:
            del self._open[call.number]
        return hidden

    def _come_back(self, link: _Link, call: Call, gradient: Tensor) -> list[Tensor | None]:
        with self._forgotten_if_broken_off(call):
            parts = torch.split(gradient, [call.num_rows[part] for part in range(len(call.begins))])
            found = backward_on_device(link, call, self.adapter, parts)
        self._open.pop(call.number, None)
        return found

    @contextmanager
    def _forgotten_if_broken_off(self, call: Call) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._forget(call.number)
            raise

    def _forget(self, number: int) -> None:
        if self._open.pop(number, None) is not None and self._link is not None:
            try:
                self._link.send(Drop(number))
            except ChannelDown:
                self._lost()

    def _forget_thrown(self) -> None:
        while self._thrown:
            self._forget(self._thrown.popleft())

    @contextmanager
    def _conversation(self) -> Iterator[None]:
        """Nobody else speaks meanwhile. Raises CloudError where the cloud says what no cloud
        says.
        """
        with self._busy:
            try:
                yield
            except Misbehaviour as error:
                raise CloudError(
                    f"the cloud breaks the conversation off: {error}; is it another version?"
                ) from error
            finally:
                self._forget_thrown()

    def _until_through(self, request: Request, attempt: Callable[[_Link], _T]) -> _T:
        """Again after a lost link or a failed part; ChannelDown only where there is no new link."""
        tries = 0
        while True:
            link = self._linked()
            try:
                result = attempt(link)
                self._went_well()
                return result
            except ChannelDown:
                self._lost()
                self.repeated += 1
            except PartFailed as failed:
                self.repeated += 1
                link.held.clear()  # it may have had no room for them
                tries = self._shrink(failed, request, tries)

    def _went_well(self) -> None:
        """What was short once may be there again."""
        self._calls_since += 1
        if self._halvings and self._calls_since >= CALLS_TO_RECOVER:
            self._halvings, self._calls_since = self._halvings - 1, 0

    # The link

    def open(self) -> Opened:
        """Make the link, if there is none; what the cloud takes of this device. Raises CloudError
        when it refuses.
        """
        self._linked()
        return self._limits

    def _linked(self) -> _Link:
        """The link, made and opened if there is none."""
        while self._link is None:
            link = _Link(self.dial(), self._open)
            try:
                link.send(Open(self.manifest))
                answer = link.receive()
            except ChannelDown:
                continue
            if isinstance(answer, Refused) and answer.later:
                self.wait(MAX_PAUSE_S)
                continue
            if isinstance(answer, Refused):
                raise CloudError(f"the cloud refuses this device: {answer.reason}")
            if not isinstance(answer, Opened):
                raise CloudError(
                    f"the cloud answered {type(answer).__name__} instead of opening; is it another"
                    " version?"
                )
            self._link, self._limits = link, answer
        return self._link

    def _lost(self) -> None:
        """The link is gone, and all that the cloud held for us with it."""
        self._link = None
        self._open.clear()

    # Parts

    def _cut(self, request: Request, before: list[range] | None = None) -> tuple[list[range], bool]:
        """The rows of each part, and whether all parts may be in the cloud at once.

        Those of ``before``, if they still fit: parts are repeated with the dropout that they had.
        """
        lengths = request.mask.sum(dim=1).tolist()
        limit, most, num_rows = self._limits.max_tokens, self._limits.max_parts, len(lengths)
        if max(lengths) > limit:
            raise CloudError(
                f"a text of {max(lengths)} tokens; the cloud takes {limit} of one device at once:"
                " lower data.max_length, or raise limits.max_tokens there"
            )
        count = min(
            num_rows,
            self.pipeline * 2**self._halvings if self._halvings else min(self.pipeline, most),
        )
        ranges = (
            before if before is not None and len(before) >= count else row_ranges(num_rows, count)
        )
        while any(sum(lengths[rows.start : rows.stop]) > limit for rows in ranges):
            ranges = row_ranges(num_rows, len(ranges) + 1)
        return ranges, len(ranges) <= most and sum(lengths) <= limit and not self._halvings

    def _make_room(self, request: Request, ranges: Sequence[range], together: bool) -> None:
        """Where the cloud cannot hold this call beside the open ones, those go through again at
        their backward.
        """
        held = [begin for call in self._open.values() for begin in call.begins]
        tokens = int(request.mask.sum()) + sum(len(begin.embedded) for begin in held)
        if (
            not together
            or len(held) + len(ranges) > self._limits.max_parts
            or tokens > self._limits.max_tokens
        ):
            self._forget_all()

    def _forget_all(self) -> None:
        for number in [*self._open]:
            self._forget(number)

    def _shrink(self, failed: PartFailed, request: Request, tries: int) -> int:
        """After a failure the next attempt takes less; returns the tries so far."""
        if failed.why == "broken":
            raise CloudError(f"the cloud could not run the body: {failed}")
        if failed.why == "expired":
            if tries >= MAX_TRIES:
                raise CloudError(
                    f"the cloud does not wait for this device ({failed}): raise limits.idle_s there"
                )
            return tries + 1
        self._forget_all()
        self._calls_since = 0
        smallest = self.pipeline * 2**self._halvings >= len(request.mask)
        if smallest and tries >= MAX_TRIES:
            raise CloudError(
                f"the cloud has no room for one text of {int(request.mask.sum(1).max())} tokens"
                f" ({failed}), asked {tries} times: lower data.max_length, or raise limits there"
            )
        if not smallest:
            self._halvings += 1
        self.wait(min(FIRST_PAUSE_S * 2**tries, MAX_PAUSE_S))
        return tries + 1

    def _call(self, link: _Link, request: Request, ranges: Sequence[range], keep: bool) -> Call:
        """A new call; what it needs of killed groups goes ahead of it."""
        units, hand_offs = self._hand_offs.units(request.factors, request.killed, link.held)
        for frame in hand_offs:
            link.send(frame)
        self._numbers += 1
        begins = [
            begin_of(request, rows, self._numbers, part, keep, units)
            for part, rows in enumerate(ranges)
        ]
        return Call(self._numbers, begins, self.hidden_width, request.factors)


class _Link:
    """A channel; it notes which calls the cloud gives up, also when it says so in the midst of
    another.
    """

    def __init__(self, channel: Channel, open_calls: dict[int, Call]) -> None:
        self._channel, self._open = channel, open_calls
        # group -> the version of its factors that was handed off on this link
        self.held: dict[int, int] = {}

    def send(self, frame: SplitFrame) -> None:
        try:
            self._channel.send(frame)
        except ValueError as error:  # more than a frame may hold
            raise CloudError(f"nothing that can be sent to the cloud: {error}") from error

    def receive(self) -> SplitFrame:
        try:
            frame = self._channel.receive()
        except ValueError as error:
            raise Misbehaviour(str(error)) from error
        if isinstance(frame, Failed) and self._open.pop(frame.call, None) is not None:
            self._channel.send(Drop(frame.call))  # its other parts
        return frame
