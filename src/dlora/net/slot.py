"""A queue for one item between two tasks; cancelling a waiting task loses no item."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from dlora.net.transport import LinkDown

_T = TypeVar("_T")


class Slot(Generic[_T]):
    """One task puts items and another gets them; ``close`` wakes both."""

    def __init__(self) -> None:
        self._items: deque[_T] = deque()
        self._closed = False
        self._changed = asyncio.Event()

    async def put(self, item: _T) -> None:
        """Put an item; waits while there is no room. Raises LinkDown when the slot is closed."""
        while self._items and not self._closed:
            await self._change()
        if self._closed:
            raise LinkDown("the link has ended")
        self._items.append(item)
        self._changed.set()

    async def get(self) -> _T:
        """Get an item; waits while there is none. Raises LinkDown when closed and empty."""
        while not self._items:
            if self._closed:
                raise LinkDown("the link has ended")
            await self._change()
        self._changed.set()
        return self._items.popleft()

    def close(self) -> None:
        """Close the slot: no more items can be put, but an item in it can still be got."""
        self._closed = True
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
