"""Lets threads use a link: cloud and device compute in threads, the links run in an event loop.

The thread that sends or receives a frame also encodes or decodes it, so that a large frame does not
delay the other links in the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dlora.net.loop_thread import LoopThread
from dlora.net.transport import LinkDown, Network, Traffic
from dlora.wire.frame import ChannelDown, FrameError, FrameKind, Link

WINDOW_FRAMES = 8  # frames that can wait at one end of a channel, in each direction
# Smaller frames are decoded within the event loop, in at most 0.3 ms; larger ones in a thread.
INLINE_BYTES = 1 << 20
FLUSH_S = 1.0  # time for the last frames to be sent when a channel closes
LOOK_S = 0.2  # time between two calls of ``give_up``
# After waiting so long for an answer, a user's stop takes effect at once and not only at the end of
# the round.
GIVE_UP_S = 3.0


class Channel:
    """One link between a device and the cloud, for use in any thread.

    Make it within the link's event loop. ``kind`` says how frames are written; both ends may set
    another one after they have agreed on it. The link itself must carry bytes
    (`FrameKind.as_bytes`).
    """

    def __init__(self, link: Link, kind: FrameKind) -> None:
        self.kind, self._link = kind, link
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()  # guards what follows
        self._incoming: deque[bytes] = deque()
        self._outgoing: deque[bytes] = deque()
        self._down = False
        # set when there may be a frame to write, and when there may be room for an incoming one
        self._to_write, self._to_read = asyncio.Event(), asyncio.Event()
        self._given_up = asyncio.Event()  # set when the other end has not taken a frame in time

    @property
    def is_down(self) -> bool:
        """Whether the link has ended. Frames that have arrived can still be received."""
        return self._down

    def send(self, frame: Any, timeout_s: float | None = None) -> None:
        """Send a frame; waits while the other end is slow.

        The link ends when the wait takes ``timeout_s``. Raises ChannelDown when the link has ended,
        and FrameError when the frame is not allowed or too long.
        """
        data = self.kind.encode(frame)
        if len(data) > self.kind.max_bytes:
            raise FrameError(
                f"a {type(frame).__name__} frame of {len(data)} bytes; at most"
                f" {self.kind.max_bytes} are allowed, so fewer tokens must go at once: a smaller"
                " batch, or more parts"
            )
        with self._changed:
            if not self._changed.wait_for(
                lambda: len(self._outgoing) < WINDOW_FRAMES or self._down, timeout_s
            ):
                self._down = True
                self._changed.notify_all()
                self._wake(self._given_up)
            if self._down:
                raise ChannelDown("the link has ended")
            self._outgoing.append(data)
            self._wake(self._to_write)

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next frame.

        Raises ChannelDown when the link has ended, TimeoutError after ``timeout_s``, and FrameError
        when the bytes are no allowed frame.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._incoming or self._down, timeout_s):
                raise TimeoutError(f"no frame within {timeout_s:g} s")
            if not self._incoming:
                raise ChannelDown("the link has ended")
            data = self._incoming.popleft()
            self._wake(self._to_read)
        return self.kind.decode(data)

    def close(self) -> None:
        """End the link after all waiting frames are sent."""
        with self._changed:
            self._down = True
            self._changed.notify_all()
            self._wake(self._to_write)

    async def carry(self, hear: Callable[[Any], object] | None = None) -> None:
        """Move frames between channel and link until the link ends or the channel is closed.

        The network's ``talk`` awaits it once for each link. ``hear`` is called with each arriving
        frame, in order, and must not block; without ``hear``, frames wait for `receive`. Ends the
        link and raises FrameError when the bytes are no allowed frame, or the error that ``hear``
        raised.
        """
        reading, writing = asyncio.create_task(self._read(hear)), asyncio.create_task(self._write())
        giving_up = asyncio.create_task(self._given_up.wait())
        try:
            await asyncio.wait({reading, writing, giving_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            giving_up.cancel()
            self.close()
            try:
                await asyncio.wait({writing}, timeout=FLUSH_S)
            finally:  # cancelled once more or not, both tasks end here
                for task in (reading, writing):
                    task.cancel()
                ended = await asyncio.gather(reading, writing, return_exceptions=True)
        for failure in ended:
            if isinstance(failure, Exception) and not isinstance(failure, LinkDown):
                raise failure

    async def _read(self, hear: Callable[[Any], object] | None) -> None:
        while True:
            data = await self._link.receive()
            if hear is None:
                await self._put(data)
            elif len(data) <= INLINE_BYTES:
                hear(self.kind.decode(data))
            else:
                hear(await asyncio.to_thread(self.kind.decode, data))

    async def _put(self, data: bytes) -> None:
        while True:
            with self._changed:
                self._to_read.clear()
                if len(self._incoming) < WINDOW_FRAMES:
                    self._incoming.append(data)
                    self._changed.notify_all()
                    return
            await self._to_read.wait()

    async def _write(self) -> None:
        """Write outgoing frames; returns when the channel is closed and all frames are written."""
        while True:
            with self._changed:
                self._to_write.clear()
                data = self._outgoing.popleft() if self._outgoing else None
                self._changed.notify_all()
                if data is None and self._down:
                    return
            if data is None:
                await self._to_write.wait()
            else:
                await self._link.send(data)

    def _wake(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the link with it
            self._loop.call_soon_threadsafe(event.set)


class WatchedChannel:
    """A device's channel that reports a cloud that does not answer.

    A cloud can stop answering while its link stays up. ``silent()`` is called once for each answer
    that takes longer than ``silence_s``, and ``back()`` when that answer arrives. After
    ``GIVE_UP_S`` of waiting, ``give_up()`` is called five times a second; when it returns True, the
    channel is closed and `receive` raises ChannelDown.
    """

    def __init__(
        self,
        channel: Channel,
        silence_s: float,
        silent: Callable[[], object],
        back: Callable[[], object],
        give_up: Callable[[], bool],
    ) -> None:
        self._channel, self._silence_s = channel, silence_s
        self._silent, self._back, self._give_up = silent, back, give_up

    def send(self, frame: Any) -> None:
        """See `Channel.send`."""
        self._channel.send(frame)

    def receive(self) -> Any:
        """See `Channel.receive`."""
        began_at, told = time.monotonic(), False
        while True:
            try:
                frame = self._channel.receive(LOOK_S)
            except TimeoutError:
                waited_s = time.monotonic() - began_at
                if waited_s >= self._silence_s and not told:
                    told = True
                    self._silent()
                if waited_s >= GIVE_UP_S and self._give_up():
                    self._channel.close()
                    raise ChannelDown("given up while the cloud owed an answer") from None
            else:
                if told:
                    self._back()
                return frame


class Dialler:
    """Makes a device's channels to its cloud, one after the other.

    The cloud is the only neighbour in ``network``.
    """

    def __init__(self, network: Network, loop: LoopThread, kind: FrameKind) -> None:
        self._network, self._loop, self._kind = network, loop, kind
        self._changed = threading.Condition()
        self._latest: Channel | None = None  # the newest channel, not yet returned by `dial`
        self._given: Channel | None = None  # the channel that `dial` returned last
        self._serving: Future[None] | None = None  # set by the first dial

    @property
    def traffic(self) -> Traffic:
        """The bytes of all channels so far, for each neighbour."""
        return self._network.traffic

    def dial(self, give_up: Callable[[], bool] = lambda: False) -> Channel:
        """Wait for a new channel to the cloud and return it; the channel returned before is ended.

        ``give_up`` is called five times a second; raises ChannelDown when it returns True. Raises
        the network's own error when the network has failed.
        """
        if self._serving is None:
            self._serving = self._loop.start(self._network.serve(self._talk))
        if self._given is not None:
            self._given.close()
        with self._changed:
            while True:
                if give_up():
                    raise ChannelDown("given up before there was a link to the cloud")
                if self._latest is not None and not self._latest.is_down:
                    self._given, self._latest = self._latest, None
                    return self._given
                if self._serving.done():
                    self._serving.result()
                    raise ChannelDown("the network has ended")
                self._changed.wait(LOOK_S)

    def close(self) -> None:
        """End the channels and stop dialling."""
        for channel in (self._given, self._latest):
            if channel is not None:
                channel.close()
        if self._serving is not None:
            self._serving.cancel()

    async def _talk(self, _: str, link: Link) -> None:
        channel = Channel(link, self._kind)
        with self._changed:
            self._latest = channel
            self._changed.notify_all()
        await channel.carry()
