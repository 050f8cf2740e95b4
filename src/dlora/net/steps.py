"""Coroutines that a thread begins and waits for, beside tasks that serve for ever."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, Future
from typing import Any, TypeVar

from dlora.net.loop_thread import LoopThread

T = TypeVar("T")
Look = Callable[[], object]
LOOK_S = 0.2  # seconds between two calls of ``look`` in a wait


class Steps:
    """Steps that a thread runs in an event loop; `close` ends those that run, and what serves.

    If a step or what serves fails, each later wait ends with its error.
    """

    def __init__(self, loop: LoopThread) -> None:
        self._loop = loop
        self._failed: Future[None] = Future()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def has_failed(self) -> bool:
        """Whether a step, or what serves, has failed."""
        return self._failed.done()

    def check(self) -> None:
        """Raise the error of the step, or of what serves, that has failed."""
        if self._failed.done():
            self._failed.result()

    def serve(self, task: asyncio.Task[None]) -> None:
        """A task that serves until `close`; call it in the loop."""
        self._tasks.add(task)
        self.watch(task)

    def watch(self, end: asyncio.Future[Any]) -> None:
        """Fail when ``end`` does; call it in the loop."""
        end.add_done_callback(self._ended)

    def start(self, step: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin a step in the loop; `result` waits for it."""
        return self._loop.start(self._step(step))

    def wait(self, step: Coroutine[Any, Any, T], look: Look = lambda: None) -> T:
        """Run a step in the loop and return its `result`."""
        return self.result(self.start(step), look)

    def result(self, running: Future[T], look: Look = lambda: None) -> T:
        """Wait for a step and return its result.

        ``look`` is called five times a second meanwhile; an error in it ends the wait, and not the
        step. Raises the step's error, or that of what serves.
        """
        ends: tuple[Future[Any], ...] = (running, self._failed)
        while not running.done():
            concurrent.futures.wait(ends, LOOK_S, FIRST_COMPLETED)
            if not running.done():
                self.check()
                look()
        return running.result()

    def close(self) -> None:
        """End the steps that run, and what serves."""
        self._loop.start(self._close()).result()

    def _ended(self, end: asyncio.Future[Any]) -> None:
        error = None if end.cancelled() else end.exception()
        while isinstance(error, ExceptionGroup):  # the first error names the cause
            error = error.exceptions[0]
        if error is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _step(self, step: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.watch(task)
        return await step

    async def _close(self) -> None:
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
