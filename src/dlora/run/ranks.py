"""The processes of one site: the main one talks with the neighbours, all get what is mixed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from dlora.lora.factors import Factors

T = TypeVar("T")


class Ranks:
    """All processes of this site's `torch.distributed`, or this one process alone.

    Every rank calls the same methods in the same order. ``limit_s``: how long the others wait for
    the main rank, which waits for neighbours.
    """

    def __init__(self, limit_s: float) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.is_main = not several or dist.get_rank() == 0
        # gloo carries CPU tensors and objects, whatever carries the gradients
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=limit_s)) if several else None
        )

    @property
    def are_several(self) -> bool:
        """Whether this site has more than one process."""
        return self._group is not None

    def on_main(self, action: Callable[[], T]) -> T:
        """Call ``action`` in the main rank only; its result, or its error, comes to all ranks."""
        if self._group is None:
            return action()
        outcome: list[object] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except BaseException as error:  # the other ranks must not wait for ever
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[1], BaseException):
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]  # what ``action`` returned

    def shared(self, tensors: Factors) -> Factors:
        """The main rank's ``tensors``; every rank gives tensors of these names and shapes."""
        if self._group is not None:
            for name in sorted(tensors):
                dist.broadcast(tensors[name], src=0, group=self._group)
        return tensors
