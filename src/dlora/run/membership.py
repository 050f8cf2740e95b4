"""One peer among its neighbours, for a thread that trains: its gossip runs in an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import FIRST_COMPLETED, Future
from pathlib import Path
from typing import Any, TypeVar

from dlora.config.run import PeersSection
from dlora.decentralized.mixing import Rule
from dlora.decentralized.peer.exchange import Exchange
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.life import PeerGossip, Progress
from dlora.decentralized.peer.messages import Messages
from dlora.decentralized.peer.patience import Patience
from dlora.decentralized.peer.word import Signatures
from dlora.decentralized.topology import Topology
from dlora.events.neighbours import NeighbourEvent
from dlora.lora.factors import Factors
from dlora.net.loop_thread import LoopThread
from dlora.net.transport import Network, Talk
from dlora.run.manifest import manifest_hash, manifest_text

T = TypeVar("T")
LOOK_S = 0.2  # seconds between two calls of ``look`` in a wait


def make_gossip(
    section: PeersSection,
    rule: Rule,
    *,
    name: str,
    manifest: Mapping[str, Any],
    topology: Topology,
    rounds: int,
    messages: Messages,
    ledger: Ledger,
    signatures: Signatures,
    factors: Factors,
    standing: Callable[[], Factors],
    check: Callable[[str, str, Path], object],
    report: Callable[[NeighbourEvent], object],
    commit: Callable[[Progress], object],
    skip: Callable[[int], object],
    progress: Progress,
) -> PeerGossip:
    """The gossip of the peer ``name`` as its config says; call it within an event loop.

    For the other arguments see `Exchange` and `PeerGossip`.
    """
    exchange = Exchange(
        name=name,
        manifest=manifest_text(manifest),
        manifest_hash=manifest_hash(manifest),
        ledger=ledger,
        neighbours=topology.neighbour_names(name),
        patience=Patience(section.silence_s, section.round_limit_s),
        messages=messages,
        check=check,
        report=report,
        signatures=signatures,
    )
    return PeerGossip(
        name=name,
        factors=factors,
        topology=topology,
        rule=rule,
        ledger=ledger,
        exchange=exchange,
        messages=messages,
        rounds=rounds,
        catch_up_after=section.catch_up_after,
        standing=standing,
        commit=commit,
        skip=skip,
        clock=time.time,
        progress=progress,
    )


class Membership:
    """The gossip and the network of one peer; `close` ends both.

    The thread that trains calls `wait` with one step of the gossip after the other. Meanwhile the
    loop answers the neighbours. ``make`` returns the gossip and is called within the loop.
    ``around``: replaces the conversation with a neighbour by one that calls it.
    """

    def __init__(
        self,
        loop: LoopThread,
        make: Callable[[], PeerGossip],
        network: Network,
        around: Callable[[Talk], Talk] = lambda talk: talk,
    ) -> None:
        self._loop = loop
        self._failed: Future[None] = Future()  # ends with the error of the network or of the disk
        self._steps: set[asyncio.Task[Any]] = set()
        self.gossip = loop.start(self._open(make, network, around)).result()

    @property
    def has_failed(self) -> bool:
        """Whether the network or this peer's own disk has failed."""
        return self._failed.done()

    def check(self) -> None:
        """Raise the error of the network or of this peer's own disk, if there is one."""
        if self._failed.done():
            self._failed.result()

    def start(self, step: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin one step of the gossip in the loop; `result` waits for it."""
        return self._loop.start(self._step(step))

    def wait(self, step: Coroutine[Any, Any, T], look: Callable[[], object] = lambda: None) -> T:
        """Run one step of the gossip in the loop and return its `result`."""
        return self.result(self.start(step), look)

    def result(self, running: Future[T], look: Callable[[], object] = lambda: None) -> T:
        """Wait for a step and return its result.

        ``look`` is called five times a second meanwhile; an error in it ends the step. Raises the
        step's error, or that of the network or of the disk.
        """
        ends: tuple[Future[Any], ...] = (running, self._failed)
        try:
            while not running.done():
                concurrent.futures.wait(ends, LOOK_S, FIRST_COMPLETED)
                if not running.done():
                    self.check()
                    look()
            return running.result()
        finally:
            running.cancel()

    def close(self) -> None:
        """End the step that runs and all links."""
        self._loop.start(self._close()).result()

    async def _open(
        self, make: Callable[[], PeerGossip], network: Network, around: Callable[[Talk], Talk]
    ) -> PeerGossip:
        gossip = make()
        self._serving = asyncio.create_task(network.serve(around(gossip.exchange.talk)))
        for end in (self._serving, gossip.exchange.failed):
            end.add_done_callback(self._ended)
        return gossip

    def _ended(self, end: asyncio.Future[None]) -> None:
        error = None if end.cancelled() else end.exception()
        while isinstance(error, ExceptionGroup):  # the first error names the cause
            error = error.exceptions[0]
        if error is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _step(self, step: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._steps.add(task)
        try:
            return await step
        finally:
            self._steps.discard(task)

    async def _close(self) -> None:
        running = [*self._steps, self._serving]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
