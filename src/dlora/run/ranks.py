"""The processes of one run or site under torchrun: who they are, and what they tell each other."""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dlora.config.launchers import launched
from dlora.errors import DloraError, RunError
from dlora.lora.factors import Factors
from dlora.net.between_ranks import one_may_end

T = TypeVar("T")
Some = TypeVar("Some", bound=BaseException)

# A rank waits so long for another one that still computes. A rank that has ended is noticed at
# once, because its connections close.
PATIENCE_S = 7 * 24 * 3600.0
JOIN_S = 600.0  # for all processes to start


class Ranks:
    """All processes of this program's `torch.distributed`, or this one process alone.

    Every rank calls the same methods in the same order. ``limit_s``: how long a rank waits for the
    others; None: this process is alone, whatever torch.distributed says. Raises RunError where
    another rank has ended.
    """

    def __init__(self, limit_s: float | None = None) -> None:
        several = (
            limit_s is not None
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        )
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.is_main = self.rank == 0
        # gloo carries CPU tensors and objects, whatever carries the gradients
        self.group: dist.ProcessGroup | None = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=limit_s or 0))
            if several
            else None
        )

    @property
    def are_several(self) -> bool:
        """Whether there is more than one process."""
        return self.group is not None

    def block(self, count: int) -> range:
        """This rank's part of ``count`` things: the blocks of all ranks are consecutive."""
        return self.blocks(count)[self.rank]

    def blocks(self, count: int) -> list[range]:
        """The part of each rank; the sizes differ by at most one."""
        starts = [rank * count // self.size for rank in range(self.size + 1)]
        return [range(*ends) for ends in zip(starts, starts[1:], strict=False)]

    # What all ranks do together

    def on_main(self, action: Callable[[], T]) -> T:
        """Call ``action`` in the main rank only; its result, or its error, comes to all ranks."""
        if self.group is None:
            return action()
        outcome: list[Any] = [None, None]
        failed: BaseException | None = None
        if self.is_main:
            try:
                outcome[0] = action()
            except BaseException as error:  # the other ranks must not wait for ever
                failed = error
                outcome[1] = _portable(error) if isinstance(error, Exception) else error
        with one_may_end():
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if failed is not None:
            raise failed
        if isinstance(outcome[1], BaseException):
            raise _told(outcome[1])
        result: T = outcome[0]
        return result

    def together(self, action: Callable[[], T], in_turns: bool = False) -> T:
        """Call ``action`` in every rank. If it fails in one, it fails in all.

        The first rank in which it failed raises its error and tells which rank that is; the others
        raise the same error as `told`. ``in_turns``: the ranks of one machine call it one after
        the other.
        """
        if self.group is None:
            return action()
        result, failed = None, None
        turn, turns = self._turn() if in_turns else (0, 1)
        for number in range(turns):
            if number:
                self.gathered(None)
            try:
                result = action() if number == turn else result
            except Exception as error:
                failed = error
        errors = self.gathered(None if failed is None else _portable(failed))
        wrong = {rank: error for rank, error in enumerate(errors) if error is not None}
        if not wrong:
            return result  # type: ignore[return-value]  # what ``action`` returned
        first = min(wrong)
        if failed is None or self.rank != first:
            raise _told(wrong[first])
        if len(wrong) < self.size and isinstance(failed, DloraError):
            failed.args = (f"rank {self.rank} of {self.size}: {failed}",)
        raise failed

    def _turn(self) -> tuple[int, int]:
        """This rank's number on its machine, and the largest number of ranks of a machine."""
        here = launched(os.environ)
        turn, ranks_here = (here.local_rank, here.local_size) if here else (0, 1)
        return turn, max(self.gathered(ranks_here))

    def told_once(self, error: DloraError) -> DloraError:
        """An error that all ranks raise, which only the main rank shows."""
        return error if self.is_main else _told(error)

    def gathered(self, value: T) -> list[T]:
        """The value of every rank, in order of the ranks; any picklable object."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with one_may_end():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def joined(self, values: Iterable[T]) -> list[T]:
        """The values of all ranks in one list, in order of the ranks."""
        return [value for of_one in self.gathered(list(values)) for value in of_one]

    def on_one_device(self, device: torch.device) -> int:
        """How many ranks share this rank's memory: those on its GPU, or on its machine."""
        count = launched(os.environ) if self.are_several else None
        if count is None:
            return 1
        devices = torch.cuda.device_count() if device.type == "cuda" else 1
        return math.ceil(count.local_size / devices)

    def any(self, asked: bool) -> bool:
        """Whether any rank says yes."""
        if self.group is None:
            return asked
        said = torch.tensor([int(asked)])
        with one_may_end():
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self.group)
        return bool(said)

    # Tensors

    def shared(self, tensors: Factors) -> Factors:
        """The main rank's ``tensors``; every rank gives tensors of these names and shapes."""
        if self.group is not None:
            for _, tensor in sorted(tensors.items()):
                carried = tensor.detach().cpu().contiguous()
                with one_may_end():
                    dist.broadcast(carried, src=0, group=self.group)
                tensor.detach().copy_(carried)
        return tensors

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, in place; the shapes are the same."""
        if self.group is None or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).cpu() for tensor in tensors])
        with one_may_end():
            dist.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


ALONE = Ranks()


def joined_ranks() -> Ranks:
    """The ranks of a simulation, as torchrun's variables in the environment say; this process alone
    where there are none.

    It joins `torch.distributed` where nobody has, until the process ends. Each rank uses a GPU of
    its own where there are enough. Raises ConfigError if a launcher started processes that cannot
    know each other, and RunError if the others cannot be reached.
    """
    count = launched(os.environ)
    if dist.is_available() and dist.is_initialized():
        return Ranks(PATIENCE_S)
    if count is None:
        return ALONE
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(count.local_rank % gpus)
    backend = "cpu:gloo,cuda:nccl" if gpus >= count.local_size else "gloo"
    try:
        store, rank, size = next(rendezvous("env://"))
        store = PrefixStore(_agreed(store, rank, size), store)
        patience = timedelta(seconds=PATIENCE_S)
        dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"rank {count.rank} of {count.size} cannot join the others"
            f" ({str(error).splitlines()[0]}); see whether MASTER_ADDR and MASTER_PORT can be"
            " reached from here"
        ) from error
    atexit.register(dist.destroy_process_group)
    return Ranks(PATIENCE_S)


def _agreed(store: Any, rank: int, size: int) -> str:
    """A name that all these processes agree on, and that no earlier process had.

    torchrun keeps its store when it starts processes again, so it still holds the addresses of the
    old ones; and on several machines the counts of restarts differ. Each process writes a fresh
    token, rank 0 proposes the list of all, and it stands once each rank has found its own token in
    it. Raises RuntimeError if that takes too long.
    """
    token, until = uuid.uuid4().hex, time.monotonic() + JOIN_S
    store.set(f"token/{rank}", token)
    seen: set[str] = set()
    while time.monotonic() < until:
        if rank == 0:
            tokens = [store.get(f"token/{one}").decode() for one in range(size)]
            store.set("proposed", " ".join(tokens))
        if store.check(["proposed"]):
            proposed = store.get("proposed").decode()
            name = hashlib.sha256(proposed.encode()).hexdigest()
            if token in proposed.split() and name not in seen:
                seen.add(name)
                store.add(f"found/{name}", 1)
            if rank == 0 and store.add(f"found/{name}", 0) == size:
                store.set("agreed", name)
            if store.check(["agreed"]) and store.get("agreed").decode() in seen:
                return str(store.get("agreed").decode())
        time.sleep(0.02)
    raise RuntimeError(f"the {size} processes did not all come within {JOIN_S:g} s")


def _told(error: Some) -> Some:
    """The same error, which another rank shows."""
    if isinstance(error, DloraError):
        error.told = True
    return error


def _portable(error: Exception) -> Exception:
    """An error that another process can read."""
    if isinstance(error, DloraError):
        return type(error)(str(error))
    return RunError(f"another rank failed: {type(error).__name__}: {error}")
