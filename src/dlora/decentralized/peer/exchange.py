"""One peer's conversations with its neighbours: offers, promises, decisions. No sockets, no clock.

Time is the event loop's, so a loop with a virtual clock runs it in virtual time. The rules:

- A message is offered once its sender's local steps are done; the receiver asks for it from the
  byte it already has.
- An edge is mixed by both ends or by neither. Its named end, the smaller name, decides: committed
  once it holds the other's message and the other's promise (`Have`), dropped when its round ends
  without. The decision is on its disk before it is told. The other end, having promised, waits for
  the decision; if its round ends first, it asks on every new link.
- A wait ends when the neighbour is decided about, has left the round, or has used up this peer's
  patience (`patience`).
- A promise and a decision to commit are signed, by this peer's own key and once they are on its
  disk. So each end holds the other's word for every edge that it has mixed, and shows it to one
  that has lost it (`word`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from dlora.decentralized.peer.belief import Implausible
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages_on_disk import round_message, round_of
from dlora.decentralized.peer.mismatch import difference
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.decentralized.peer.patience import BEATS, Patience, Waits
from dlora.decentralized.peer.word import Signatures, Words
from dlora.errors import RunError
from dlora.wire.frame import Link, Misbehaviour
from dlora.wire.peer.frames import Chunk, Decided, Frame, Have, Hello, Offer, Shown, Status, Want


class Exchange:
    """All edges of the peer ``name``. ``check(neighbour, message_name, path)`` raises ValueError
    unless a file is what it should be, Implausible where it is that and yet not to be believed:
    such a message is as if it had not come.

    ``sizes(message_name)``: the lengths that a message of that name can have, none where no peer
    sends one. ``report(event, **fields)`` hears what happened and why. ``signatures`` makes this
    peer's and checks its neighbours'. ``since``, which the peer's life sets, is the round to which
    it last caught up. ``failed`` ends with the error that this peer's own disk or folder has.
    """

    def __init__(
        self,
        name: str,
        manifest: str,
        run: str,
        ledger: Ledger,
        neighbours: Iterable[str],
        patience: Patience,
        sizes: Callable[[str], range],
        check: Callable[[str, str, Path], object],
        report: Callable[..., object],
        signatures: Signatures,
    ) -> None:
        self.name, self.manifest, self.run, self.ledger = name, manifest, run, ledger
        self.patience, self.sizes, self.check, self.report = patience, sizes, check, report
        self.neighbours = {other: Neighbour(other) for other in neighbours}
        self.words = Words(name, run, ledger, signatures, report)
        self.round = self.since = 0
        # (neighbour, message) asked for beside this round's edges
        self.wanted: set[tuple[str, str]] = set()
        self._edges: frozenset[str] = frozenset()  # the neighbours of the exchange under way
        self._waits = Waits(patience)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # What the peer's life calls

    def enter(self, round: int) -> None:
        """A round begins, with local steps; say so to everybody."""
        self.round, self._edges = round, frozenset()
        for neighbour in self.neighbours.values():
            for passed in sorted(neighbour.promised):  # in rounds that were skipped to catch up
                if passed < round and self.ledger.state(passed, neighbour.name) is None:
                    self._record(neighbour, passed, False, "the round was skipped")
            neighbour.say(Status(round))

    async def mix_round(self, neighbours: Iterable[str]) -> None:
        """Exchange this round's message, which the ledger holds, with ``neighbours``; returns when
        each edge is done with.
        """
        self._edges = frozenset(neighbours)
        started_at = asyncio.get_running_loop().time()
        for other in self._edges:
            self._offer(self.neighbours[other], round_message(self.round))
            try:
                self._consider(self.neighbours[other])
            # outside its conversation, which may go on without that promise
            except Misbehaviour as error:
                self.report(
                    "implausible",
                    neighbour=other,
                    message=round_message(self.round),
                    reason=str(error),
                )
        await asyncio.gather(
            *(self._edge(self.neighbours[other], started_at) for other in self._edges)
        )

    async def fetch(self, neighbour: str, message: str) -> Path | None:
        """A message of a neighbour beside the rounds' own, waited for; None when it does not come.

        A round's message is there already, or never: it is given up when its bytes stop coming or
        another is offered.
        """
        clock, other = asyncio.get_running_loop(), self.neighbours[neighbour]
        began_at, of_round = clock.time(), round_of(message) is not None
        self.wanted.add((neighbour, message))
        self._consider(other)

        def done() -> bool:
            if self.ledger.received(neighbour, message) is not None or message in other.implausible:
                return True
            offer = other.offers.get("round")
            replaced = offer is not None and offer.name != message
            stalled = clock.time() >= max(began_at, other.stored_at) + self.patience.silence_s
            return of_round and (replaced or stalled)

        reason = await self._waits.until(other, done, began_at)
        self.wanted.discard((neighbour, message))
        if reason is not None:
            self.report("not-fetched", neighbour=neighbour, message=message, reason=reason)
        came = self.ledger.received(neighbour, message)
        return None if came is None else came.path

    def offer(self, neighbours: Iterable[str], message: str) -> None:
        """Tell ``neighbours`` that a message of ours is there."""
        for other in neighbours:
            self._offer(self.neighbours[other], message)

    async def greeted(self, limit_s: float) -> None:
        """Return when every neighbour has said hello or was refused, at the latest after
        ``limit_s``.
        """
        limit = asyncio.get_running_loop().time() + limit_s
        while asyncio.get_running_loop().time() < limit and any(
            other.round is None and not other.refused for other in self.neighbours.values()
        ):
            await self._waits.change(limit)

    def wait_anew(self) -> None:
        """Give who is away another ``silence_s`` to come back."""
        for other in self.neighbours.values():
            other.away = False

    async def settled(self, last: int) -> None:
        """Return when no edge with a neighbour that is here is in doubt, and all that are here are
        in round ``last``.
        """
        began_at = asyncio.get_running_loop().time()

        async def settle(other: Neighbour) -> None:
            reason = await self._waits.until(
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
                self.report("ended-without", neighbour=other.name, reason=reason, in_doubt=doubts)

        await asyncio.gather(*(settle(other) for other in self.neighbours.values()))

    async def all_said(self) -> None:
        """Return when the wires have taken all that was to be said, so that who goes does not seem
        to fall silent.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.patience.silence_s / BEATS):
                for other in self.neighbours.values():
                    if other.link is not None:
                        await other.all_said.wait()

    def disbelieve(self, neighbour: str, reason: str) -> None:
        """A neighbour says that it is far ahead, and is not followed; reported once for each
        link.
        """
        other = self.neighbours[neighbour]
        if not other.disbelieved:
            other.disbelieved = True
            self.report("not-followed", neighbour=neighbour, reason=reason)

    def compare(self, message: str, last: int) -> None:
        """Report each neighbour that has come to round ``last`` and offered another content of
        ``message``, or none.
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
            self.report("other-content", neighbour=other.name, message=message, reason=reason)

    def decides(self, neighbour: str) -> bool:
        """Whether this peer is the named end of the edge with ``neighbour``."""
        return self.name < neighbour

    # What the network calls

    async def talk(self, name: str, link: Link) -> None:
        """The conversation on one link with the neighbour ``name``, until it ends."""
        other = self.neighbours[name]
        await link.send(
            Hello(
                self.run,
                self.manifest,
                self.round,
                self.ledger.id,
                self.ledger.known(name),
                self.since,
            )
        )
        try:
            async with asyncio.timeout(self.patience.silence_s):
                hello = await link.receive()
        except TimeoutError:
            return
        if not isinstance(hello, Hello):
            self.report(
                "unlinked",
                neighbour=name,
                reason=f"refused: it began with {type(hello).__name__} instead of Hello",
            )
            return
        if hello.run != self.run:
            self._refuse(other, difference(self.name, self.manifest, name, hello.manifest))
            with contextlib.suppress(TimeoutError):  # the other end may not have read our Hello yet
                async with asyncio.timeout(self.patience.silence_s):
                    await link.receive()
            return
        if (abandoned := self.words.abandoned(name, hello)) is not None:
            await link.send(abandoned)
            self.report(
                "unlinked",
                neighbour=name,
                reason="refused: it uses a folder again that it had given up for another one",
            )
            return
        other.linked(link)
        other.ledger = hello.ledger
        self.report("linked", neighbour=name, round=hello.round)
        for shown in self.words.lacking(name, hello):
            other.say(shown)
        for round in self.ledger.in_doubt(name):
            other.say(Have(round, self.words.ours(name, round)))
        newest = self.ledger.newest_round_sent()
        if newest is not None:
            self._offer(other, round_message(newest))
        for message in ("sum", "average"):
            if self.ledger.own(message):
                self._offer(other, message)
        # after the promises, or the other end would leave them out; after what is to be had
        other.say(Status(self.round))
        writer = asyncio.ensure_future(
            other.write(link, self.ledger, lambda: self.round, self.patience.silence_s / BEATS)
        )
        reason = "the link broke"
        try:
            self._waits.heard(other)
            while True:
                async with asyncio.timeout(self.patience.silence_s):
                    frame = await link.receive()
                self._hear(other, frame)
                self._waits.heard(other)
        except TimeoutError:
            reason = f"nothing came for {self.patience.silence_s:g} s"
        except Misbehaviour as error:
            reason = f"refused: {error}"
        # this peer's own folder: no neighbour is to blame, and nothing may go on
        except (RunError, OSError) as error:
            reason = "this peer's folder cannot be gone on with"
            if not self.failed.done():
                where = getattr(error, "filename", None) or self.ledger.folder
                told = (
                    f"{where} cannot be used ({getattr(error, 'strerror', None) or error}); fix"
                    " that, then add --resume"
                )
                self.failed.set_exception(error if isinstance(error, RunError) else RunError(told))
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            if other.link is link:
                other.link = None
                other.all_said.set()
            self.report("unlinked", neighbour=name, reason=reason)
            self._waits.pulse()

    def _hear(self, other: Neighbour, frame: Frame) -> None:
        match frame:
            case Status(round):
                other.round = round
            case Offer():
                sizes = self.sizes(frame.name)
                if not sizes:
                    raise Misbehaviour(f"it offered {frame.name}, which is no message of this run")
                if frame.num_bytes not in sizes:
                    bounds = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
                    raise Misbehaviour(
                        f"it offered {frame.name} of {frame.num_bytes} bytes; that has {bounds}"
                    )
                kind = frame.name if round_of(frame.name) is None else "round"
                if kind not in other.offers or other.offers[kind].name != frame.name:
                    other.offers[kind] = frame
                self._consider(other)
            case Want(name, offset):
                message = self.ledger.own(name)
                if message is not None and offset < message.num_bytes:
                    other.outgoing = (name, offset)
                    other.wake.set()
            case Chunk(name):
                try:
                    arrived = other.store(frame, self.ledger, self.check)
                except Implausible as error:
                    arrived = False
                    self.report(
                        "implausible", neighbour=other.name, message=name, reason=str(error)
                    )
                if arrived and round_of(name) == self.round and other.name in self._edges:
                    self._promise(other, self.round)
            case Have(round, signature):
                if not self.decides(other.name):
                    raise Misbehaviour(f"it promised in round {round}, which is its own to decide")
                if round <= self.round:
                    other.promised[round] = signature
                    self._decide(other, round)
            case Decided(round, committed, signature):
                if self.decides(other.name):
                    raise Misbehaviour(f"it decided round {round}, which is not its to decide")
                if self.ledger.state(round, other.name) == "promised":
                    if committed and not self.words.is_theirs(other, round, signature):
                        raise Misbehaviour(
                            f"its decision of round {round} is not signed by it, over the messages"
                            " that are here"
                        )
                    self._record(other, round, committed, "decided", signature)
            case Shown(round):
                if self.words.is_to_restore(other.name, frame, self.since):
                    self._record(
                        other,
                        round,
                        True,
                        "it showed this peer's own signature, and the ledger had lost the line",
                    )
            case Hello():
                raise Misbehaviour("it said Hello twice")

    def _consider(self, other: Neighbour) -> None:
        """Fetch what the neighbour offers, if it is for now; promise what is already here."""
        for offer in other.offers.values():
            mixes = round_of(offer.name) == self.round and other.name in self._edges
            if (
                not mixes and (other.name, offer.name) not in self.wanted
            ) or offer.name in other.implausible:
                continue
            if self.ledger.received(other.name, offer.name):
                if mixes:
                    self._promise(other, self.round)
            else:
                other.fetch(offer, self.ledger)

    def _promise(self, other: Neighbour, round: int) -> None:
        """The neighbour's message is here: promise to mix it, or decide when that is ours."""
        if self.decides(other.name):
            self._decide(other, round)
        elif self.ledger.state(round, other.name) in (None, "promised"):
            if self.ledger.state(round, other.name) is None:
                self.ledger.record(round, other.name, "promised", other.ledger)
            other.say(Have(round, self.words.ours(other.name, round)))

    def _decide(self, other: Neighbour, round: int) -> None:
        """Commit the edge if both messages are where they should be; answer what is already
        decided.

        A promise counts for the messages that are here. One for others came from a copy of the
        neighbour's folder, or has lain there since this peer's own was restored: what is committed
        here is not committed there.
        """
        name = round_message(round)
        state, promise = self.ledger.state(round, other.name), other.promised.get(round)
        if (
            state is None
            and round == self.round
            and self.ledger.own(name)
            and self.ledger.received(other.name, name)
        ):
            if promise is not None and self.words.is_theirs(other, round, promise):
                self._record(other, round, True, "both messages arrived", promise)
            elif promise is not None:
                del other.promised[round]
                raise Misbehaviour(
                    f"its promise of round {round} is not signed by it, over the messages that are"
                    " here"
                )
        elif state is not None:
            committed = state == "committed" and (
                promise is None or self.words.is_theirs(other, round, promise)
            )
            other.say(
                Decided(round, committed, self.words.ours(other.name, round) if committed else b"")
            )
        elif round < self.round:
            self._record(other, round, False, "the round is over")

    def _record(
        self, other: Neighbour, round: int, committed: bool, reason: str, signature: bytes = b""
    ) -> None:
        self.ledger.record(
            round, other.name, "committed" if committed else "dropped", other.ledger, signature
        )
        self.report("edge", neighbour=other.name, round=round, committed=committed, reason=reason)
        if self.decides(other.name):
            other.say(
                Decided(round, committed, self.words.ours(other.name, round) if committed else b"")
            )
        self._waits.pulse()

    async def _edge(self, other: Neighbour, started_at: float) -> None:
        """Wait until this round's edge is decided or given up; leave it out then."""
        round = self.round
        name = round_message(round)

        def state() -> str | None:
            return self.ledger.state(round, other.name)

        reason = await self._waits.until(
            other,
            lambda: (
                state() in ("committed", "dropped")
                or name in other.implausible
                or (
                    state() is None
                    and other.round is not None
                    and other.round > round
                    and other.link is not None
                )
            ),
            started_at,
        )
        if state() in ("committed", "dropped"):
            if state() == "committed":
                other.stalls = 0
            return
        if reason is not None and other.link is not None and not other.away:
            other.stalls += 1
        reason = reason or other.implausible.get(name) or f"it is already in round {other.round}"
        if self.decides(other.name):
            self._record(other, round, False, reason)
        else:
            doubt = state() == "promised"
            self.report(
                "edge",
                neighbour=other.name,
                round=round,
                committed=None if doubt else False,
                reason=reason,
            )

    def _offer(self, other: Neighbour, name: str) -> None:
        message = self.ledger.own(name)
        assert message is not None, "a message is kept before it is offered"
        other.say(Offer(name, message.num_bytes, message.sha256))

    def _refuse(self, other: Neighbour, reason: str) -> None:
        if other.refused != reason:
            other.refused = reason
            self.report("refused", neighbour=other.name, reason=reason)
        self._waits.pulse()
