"""One peer's exchanges with its neighbours, as its life asks for them. No sockets, no clock.

Time is the event loop's, so a loop with a virtual clock runs it in virtual time. A wait ends when
the edge is decided, when the neighbour has left the round, or when this peer's patience has ended
(`patience`). `edges` has the rules of promises and decisions, `conversation` has what goes over a
link.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from dlora.decentralized.peer.conversation import Conversation
from dlora.decentralized.peer.edges import Edges
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages import Messages
from dlora.decentralized.peer.messages_on_disk import round_message, round_of
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.decentralized.peer.patience import BEATS, Patience, Waits
from dlora.decentralized.peer.word import Signatures, Words
from dlora.events.neighbours import (
    EndedWithout,
    NeighbourEvent,
    NotBelieved,
    NotFetched,
    NotFollowed,
    OtherContent,
)
from dlora.wire.frame import Link, Misbehaviour
from dlora.wire.peer.frames import Status


class Exchange:
    """All edges of the peer ``name``.

    ``check(neighbour, message_name, path)`` raises ValueError if a file is not the message that it
    should be. It raises Implausible if it is that message but cannot be believed; such a message
    counts as not received. ``report`` hears each event.
    ``signatures`` makes this peer's signatures and checks its neighbours'. ``failed`` ends with the
    error if this peer's own disk or folder fails.
    """

    def __init__(
        self,
        *,
        name: str,
        manifest: str,
        manifest_hash: str,
        ledger: Ledger,
        neighbours: Iterable[str],
        patience: Patience,
        messages: Messages,
        check: Callable[[str, str, Path], object],
        report: Callable[[NeighbourEvent], object],
        signatures: Signatures,
    ) -> None:
        self.ledger, self.patience, self.report = ledger, patience, report
        self.neighbours = {other: Neighbour(other) for other in neighbours}
        words = Words(name, manifest_hash, ledger, signatures, report)
        self.edges = Edges(name, ledger, self.neighbours, words, Waits(patience), report)
        self._conversation = Conversation(
            self.edges, manifest, manifest_hash, patience, messages, check
        )
        self.failed = self._conversation.failed

    async def talk(self, name: str, link: Link) -> None:
        """Talk with a neighbour over a link until it ends; the network calls this."""
        await self._conversation(name, link)

    def enter(self, round: int) -> None:
        """Begin a round, with its local steps, and tell all neighbours."""
        self.edges.round, self.edges.mixing = round, frozenset()
        for neighbour in self.neighbours.values():
            # promises in rounds that this peer skipped to catch up
            for passed in sorted(neighbour.promised):
                if passed < round and self.ledger.state(passed, neighbour.name) is None:
                    self.edges.record(neighbour, passed, False, "the round was skipped")
            neighbour.say(Status(round))

    async def mix_round(self, neighbours: Iterable[str]) -> None:
        """Exchange this round's message, which the ledger holds, with ``neighbours``.

        Returns when each edge is decided or given up.
        """
        self.edges.mixing = frozenset(neighbours)
        started_at = asyncio.get_running_loop().time()
        for other in self.edges.mixing:
            self.edges.offer(self.neighbours[other], round_message(self.edges.round))
            try:
                self.edges.consider(self.neighbours[other])
            # no frame is being read here, and the conversation may go on without that promise
            except Misbehaviour as error:
                name = round_message(self.edges.round)
                self.report(
                    NotBelieved(
                        event="implausible", neighbour=other, message=name, reason=str(error)
                    )
                )
        await asyncio.gather(
            *(self.edges.settle(self.neighbours[other], started_at) for other in self.edges.mixing)
        )

    async def fetch(self, neighbour: str, message: str) -> Path | None:
        """Wait for a neighbour's message that is not for this round's mix; None if it does not
        come.

        A neighbour either has the message of a round already or will never have it. The wait for
        such a message ends when its bytes stop coming or when the neighbour offers another round.
        """
        clock, other = asyncio.get_running_loop(), self.neighbours[neighbour]
        began_at, of_round = clock.time(), round_of(message) is not None
        self.edges.wanted.add((neighbour, message))
        self.edges.consider(other)

        def done() -> bool:
            if self.ledger.received(neighbour, message) is not None or message in other.implausible:
                return True
            offer = other.offers.get("round")
            replaced = offer is not None and offer.name != message
            stalled = clock.time() >= max(began_at, other.stored_at) + self.patience.silence_s
            return of_round and (replaced or stalled)

        reason = await self.edges.waits.until(other, done, began_at)
        self.edges.wanted.discard((neighbour, message))
        if reason is not None:
            self.report(
                NotFetched(event="not-fetched", neighbour=neighbour, message=message, reason=reason)
            )
        came = self.ledger.received(neighbour, message)
        return None if came is None else came.path

    def offer(self, neighbours: Iterable[str], message: str) -> None:
        """Offer a message of this peer to ``neighbours``."""
        for other in neighbours:
            self.edges.offer(self.neighbours[other], message)

    def late(self) -> list[str]:
        """The neighbours for which this peer waits now: edges that are not decided, or else
        neighbours that are in an earlier round.
        """
        round = self.edges.round
        undecided = [
            name
            for name in self.edges.mixing
            if self.ledger.state(round, name) in (None, "promised")
        ]
        return sorted(undecided) or [
            other.name
            for other in self.neighbours.values()
            if other.round is None or other.round < round
        ]

    async def greeted(self, limit_s: float) -> None:
        """Return when every neighbour has said its round or was refused, at the latest after
        ``limit_s``.
        """
        limit = asyncio.get_running_loop().time() + limit_s
        while asyncio.get_running_loop().time() < limit and any(
            other.round is None and not other.refused for other in self.neighbours.values()
        ):
            await self.edges.waits.change(limit)

    def wait_anew(self) -> None:
        """Give neighbours that are away another ``silence_s`` to come back."""
        for other in self.neighbours.values():
            other.away = False

    async def settled(self, last: int) -> None:
        """Return when no edge with a present neighbour is in doubt and all present neighbours are
        in round ``last``.
        """
        began_at = asyncio.get_running_loop().time()

        async def settle(other: Neighbour) -> None:
            reason = await self.edges.waits.until(
                other,
                lambda: (
                    not self.ledger.in_doubt(other.name)
                    and other.round is not None
                    and other.round >= last
                ),
                began_at,
            )
            if reason is not None:
                doubts = len(self.ledger.in_doubt(other.name))
                self.report(
                    EndedWithout(
                        event="ended-without", neighbour=other.name, reason=reason, in_doubt=doubts
                    )
                )

        await asyncio.gather(*(settle(other) for other in self.neighbours.values()))

    async def all_said(self) -> None:
        """Return when the wires have taken all queued frames, so that this peer does not seem to
        fall silent when it ends.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.patience.silence_s / BEATS):
                for other in self.neighbours.values():
                    if other.link is not None:
                        await other.all_said.wait()

    def disbelieve(self, neighbour: str, reason: str) -> None:
        """Do not follow a neighbour that says it is far ahead; reported once for each link."""
        other = self.neighbours[neighbour]
        if not other.disbelieved:
            other.disbelieved = True
            self.report(NotFollowed(event="not-followed", neighbour=neighbour, reason=reason))

    def compare(self, message: str, last: int) -> None:
        """Report each neighbour in round ``last`` or later that did not offer the same content of
        ``message``.
        """
        own = self.ledger.own(message)
        for other in self.neighbours.values():
            offer = other.offers.get(message)
            if (
                own is None
                or other.round is None
                or other.round < last
                or (offer and offer.sha256 == own.sha256)
            ):
                continue
            reason = (
                f"its {message} has another hash"
                if offer
                else f"it did not say which {message} it has"
            )
            self.report(
                OtherContent(
                    event="other-content", neighbour=other.name, message=message, reason=reason
                )
            )
