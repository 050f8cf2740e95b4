"""A link for threads that wait: cloud and device compute in threads of their own, the wire lives in
one event loop.

Frames become bytes, and bytes frames, in the thread that sends or receives, so that a large one
holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from dlora.net.transport import LinkDown, Network, Traffic
from dlora.wire.frame import ChannelDown, FrameError, FrameKind, Link

WINDOW_FRAMES = 8  # that wait at one end of a channel, each way
INLINE_BYTES = 1 << 20  # decoded within the event loop: 0.3 ms at most; more than that in a thread
FLUSH_S = 1.0  # for the last frames to leave
LOOK_S = 0.2  # between two questions whether to give up
GIVE_UP_S = 3.0  # of an answer, after which a user's stop is not put off to the end of the round


class Channel:
    """One link between a device and the cloud. Made in the link's event loop, used in any thread.

    ``kind`` is how frames are written; both ends may change it once they have agreed. The link
    carries it ``as_bytes``.
    """

    def __init__(self, link: Link, kind: FrameKind) -> None:
        self.kind, self._link = kind, link
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()  # guards what follows
        self._incoming: deque[bytes] = deque()
        self._outgoing: deque[bytes] = deque()
        self._down = False
        # there may be something; there may be room
        self._to_write, self._to_read = asyncio.Event(), asyncio.Event()
        self._given_up = asyncio.Event()  # the other end takes nothing any more

    @property
    def is_down(self) -> bool:
        """Whether nothing can be sent any more; what has arrived can still be received."""
        return self._down

    def send(self, frame: Any, timeout_s: float | None = None) -> None:
        """Hand a frame to the link; waits while the other end is slow, and ends the link when that
        takes ``timeout_s``.

        Raises ChannelDown, and FrameError for a bad frame.
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
        """The next frame. Raises ChannelDown at the end, TimeoutError, and FrameError for what is
        no frame.
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
        """End the link, after what was sent has left."""
        with self._changed:
            self._down = True
            self._changed.notify_all()
            self._wake(self._to_write)

    async def carry(self, hear: Callable[[Any], object] | None = None) -> None:
        """Carry frames until the link ends or is closed; to be awaited, once, by the conversation
        of the network.

        Frames that arrive go to ``hear``, one after the other, which may not block; without it,
        they wait for ``receive``. Raises FrameError for what is no frame, and what ``hear`` raises,
        each after ending the link.
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
        """Returns when the channel was closed and all is written."""
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
    """A channel of a device that looks, while it waits for an answer, whether that is too long: a
    cloud can hang, link and all.

    ``silent()`` is called once for each answer that takes more than ``silence_s``, ``back()`` when
    it has come. ``give_up`` is asked five times a second once ``GIVE_UP_S`` have passed; the wait
    then ends with ChannelDown.
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


class LoopThread:
    """An event loop in a thread of its own, for programs that wait in ordinary calls; ``with`` ends
    it.
    """

    def __init__(self) -> None:
        begun: Future[asyncio.AbstractEventLoop] = Future()
        self._end = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(begun)), name="dlora-wire", daemon=True
        )
        self._thread.start()
        self._loop = begun.result()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        """Run it in the loop until it returns or the loop ends."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel everything that runs in the loop, wait until it has ended, end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
        # which may be where the collector finds a forgotten model
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> LoopThread:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _main(self, begun: Future[asyncio.AbstractEventLoop]) -> None:
        begun.set_result(asyncio.get_running_loop())
        await self._end.wait()


class Dialler:
    """The device's way to its cloud: one channel after the other, over a network whose only
    neighbour is the cloud.
    """

    def __init__(self, network: Network, loop: LoopThread, kind: FrameKind) -> None:
        self._network, self._loop, self._kind = network, loop, kind
        self._changed = threading.Condition()
        self._latest: Channel | None = None  # that nobody has yet
        self._given: Channel | None = None
        self._serving: Future[None] | None = None  # from the first dial on

    @property
    def traffic(self) -> Traffic:
        """Bytes by neighbour, of all channels so far."""
        return self._network.traffic

    def dial(self, give_up: Callable[[], bool] = lambda: False) -> Channel:
        """A channel to the cloud, as soon as it can be had; ends the one given before.

        Raises ChannelDown once ``give_up`` says so, which is asked five times a second; whatever
        the network failed with.
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
        """End the channel and dial no more."""
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
