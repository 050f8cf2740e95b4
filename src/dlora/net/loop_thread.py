"""An event loop in its own thread, for programs that use blocking calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop in its own thread, for programs that use blocking calls; ``with`` ends it."""

    def __init__(self) -> None:
        begun: Future[asyncio.AbstractEventLoop] = Future()
        self._end = asyncio.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(begun)), name="dlora-wire", daemon=True
        )
        self._thread.start()
        self._loop = begun.result()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the loop until it returns or the loop ends."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel everything that runs in the loop, wait until it has ended, end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
        # The garbage collector may call this from the loop's own thread, which cannot join itself.
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
