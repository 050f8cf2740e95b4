"""The device's calls of the cloud: forwards and backwards, cut into parts, repeated on failure."""

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
# tries of a call for which the cloud has no memory, or whose parts it gives up before the device
# answers
MAX_TRIES = 8
CALLS_TO_RECOVER = 100  # after so many calls without a shortage of memory, the parts grow again
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 8.0  # seconds of waiting before the cloud is asked again


@dataclass
class Sent:
    """A request that has gone through the cloud: its backward needs what is here."""

    request: Request
    ranges: list[range]  # the rows of each part
    # The call that the cloud may still hold. None: its parts were too large for the cloud together,
    # and each is sent again for its backward.
    call: Call | None


class Calls:
    """All that one device asks of its cloud, over one link after another.

    ``dial`` waits for a link; when it raises ChannelDown, the call fails. ``wait`` sleeps for some
    seconds; the program hands it in, so that a test can use a virtual clock. ``pipeline``: the
    number of parts a batch is cut into. The cloud holds nothing that cannot be computed again. A
    call is repeated with the same numbers, dropout seed and factors, and its gradients count only
    when all of it has succeeded.

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
        self.repeated = 0  # attempts that a lost link or a full cloud made useless
        self._link: _Link | None = None
        self._limits = Opened(1, 1)
        self._hand_offs = HandOffs(adapter)
        self._numbers = 0
        # how often the parts were halved because the cloud's memory was too small
        self._halvings = 0
        self._calls_since = 0  # calls that succeeded since the memory was last too small
        self._open: dict[int, Call] = {}  # calls whose parts the cloud holds
        self._busy = threading.Lock()  # only one call runs at a time
        # calls whose backward will never come; the cloud must still be told
        self._thrown: deque[int] = deque()

    def forward(self, request: Request, keep: bool) -> tuple[Sent, Tensor]:
        """Send the request through the body; returns what its backward needs, and what the head
        reads.

        The tensor is (rows, hidden width), with the real tokens or the batch's rows in order.
        ``keep``: a backward will follow. Raises CloudError if the cloud refuses or fails.
        """
        with self._conversation():
            return self._until_through(request, lambda link: self._forward(link, request, keep))

    def backward(self, sent: Sent, gradient: Tensor) -> list[Tensor | None]:
        """The gradients of the factors, in the order of ``adapter.tensors``.

        ``gradient``: of the tensor that ``forward`` returned, with the same shape. Raises RunError
        if it has a value that is not finite, CloudError if the cloud fails.
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
        """Tell the cloud to forget a call whose backward will never come.

        If another call is running, the cloud is told after that call: Python may collect garbage at
        any moment and in any thread.
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
        # The parts are too large for the cloud together: it keeps nothing, and the backward sends
        # each part again.
        hidden = [
            self._go(link, self._call(link, request, [rows], keep=False))[0] for rows in ranges
        ]
        return Sent(request, ranges, None), torch.cat(hidden)

    def _backward(self, link: _Link, sent: Sent, gradient: Tensor) -> list[Tensor | None]:
        if sent.call is None or sent.call.number not in self._open:
            before = sent.ranges
            sent.ranges, together = self._cut(sent.request, before)
            if sent.request.seed is not None and sent.ranges != before:
                # Dropout masks follow the parts. With other parts, the gradient would belong to
                # another loss than the one computed.
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
        """Forward again and backward for each part in turn; gradients are summed in the order of
        the parts.
        """
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
        """Run the forward of a call; returns the hidden states of each part."""
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
        """Only one call runs inside this context.

        Raises CloudError if the cloud sends what no correct cloud sends.
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
        """Repeat ``attempt`` after a lost link or a failed part, until it succeeds.

        Raises ChannelDown if there is no new link, CloudError if trying again is useless.
        """
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
                link.held.clear()  # the cloud may have had no memory for what was handed off
                tries = self._shrink(failed, request, tries)

    def _went_well(self) -> None:
        """After many calls without a shortage of memory, use larger parts again."""
        self._calls_since += 1
        if self._halvings and self._calls_since >= CALLS_TO_RECOVER:
            self._halvings, self._calls_since = self._halvings - 1, 0

    # The link

    def open(self) -> Opened:
        """Make the link, if there is none; returns what the cloud takes of one device.

        Raises CloudError if the cloud refuses.
        """
        self._linked()
        return self._limits

    def _linked(self) -> _Link:
        """The link; it is made and opened if there is none."""
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
        """Note that the link is gone: the cloud has forgotten all calls."""
        self._link = None
        self._open.clear()

    # Parts

    def _cut(self, request: Request, before: list[range] | None = None) -> tuple[list[range], bool]:
        """The rows of each part, and whether all parts may be in the cloud at once.

        Returns the ranges ``before`` if they still fit, so that a repeated part draws the same
        dropout. Raises CloudError if one text has more tokens than the cloud takes.
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
        """Drop the open calls if the cloud cannot hold this call beside them.

        The parts of a dropped call are sent again at its backward.
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
        """Make the next attempt smaller after a failed part; returns the number of tries so far.

        Raises CloudError if trying again is useless.
        """
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
        """A new call; the factors of killed units that it needs are sent before it."""
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
    """A channel that also notes which calls the cloud gives up while another call runs."""

    def __init__(self, channel: Channel, open_calls: dict[int, Call]) -> None:
        self._channel, self._open = channel, open_calls
        # unit -> the version of its factors that was handed off on this link
        self.held: dict[int, int] = {}

    def send(self, frame: SplitFrame) -> None:
        try:
            self._channel.send(frame)
        except ValueError as error:  # the frame would be larger than the wire allows
            raise CloudError(f"nothing that can be sent to the cloud: {error}") from error

    def receive(self) -> SplitFrame:
        try:
            frame = self._channel.receive()
        except ValueError as error:
            raise Misbehaviour(str(error)) from error
        if isinstance(frame, Failed) and self._open.pop(frame.call, None) is not None:
            # lets the cloud forget the other parts of that call
            self._channel.send(Drop(frame.call))
        return frame
