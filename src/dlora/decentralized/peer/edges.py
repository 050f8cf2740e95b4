"""The edges of one peer: promises and decisions, on its disk before a neighbour hears of them.

- Both ends mix an edge, or neither does. The end with the smaller name decides: it commits when it
holds the other's message and the other's promise (`Have`), and drops the edge if its round ends
before. The decision is on its disk before it is sent. The other end, after its promise, waits for
the decision. If its round ends first, it sends the promise again on every new link.

- A promise and a decision to commit are signed with the peer's own key once they are on its disk.
Each end then holds the other's word for every edge that it has mixed, and can show it to a
neighbour that has lost it (`word`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages_on_disk import round_message, round_of
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.decentralized.peer.patience import Waits
from dlora.decentralized.peer.word import Words
from dlora.events.neighbours import EdgeEnded, NeighbourEvent
from dlora.wire.frame import Misbehaviour
from dlora.wire.peer.frames import Decided, Have, Offer, Shown


class Edges:
    """What the peer ``name`` and its neighbours agree on, edge by edge.

    ``round``: the round that this peer is in. ``mixing``: the neighbours of the present exchange.
    ``since``: the round to which this peer last caught up.
    """

    def __init__(
        self,
        name: str,
        ledger: Ledger,
        neighbours: Mapping[str, Neighbour],
        words: Words,
        waits: Waits,
        report: Callable[[NeighbourEvent], object],
    ) -> None:
        self.name, self.ledger, self.neighbours, self.words = name, ledger, neighbours, words
        self.waits, self.report = waits, report
        self.round = self.since = 0
        self.mixing: frozenset[str] = frozenset()
        # (neighbour, message) that are wanted besides this round's messages
        self.wanted: set[tuple[str, str]] = set()

    def decides(self, neighbour: str) -> bool:
        """Whether this peer decides about the edge with ``neighbour``."""
        return self.name < neighbour

    def offer(self, other: Neighbour, name: str) -> None:
        """Offer a message of this peer, which must be on disk."""
        message = self.ledger.own(name)
        assert message is not None, "a message is kept before it is offered"
        other.say(Offer(name, message.num_bytes, message.sha256))

    def consider(self, other: Neighbour) -> None:
        """Fetch the neighbour's offers that are needed now; promise a message that is
        already here.
        """
        for offer in other.offers.values():
            mixes = round_of(offer.name) == self.round and other.name in self.mixing
            if (
                not mixes and (other.name, offer.name) not in self.wanted
            ) or offer.name in other.implausible:
                continue
            if self.ledger.received(other.name, offer.name):
                if mixes:
                    self.promise(other, self.round)
            else:
                other.fetch(offer, self.ledger)

    def promise(self, other: Neighbour, round: int) -> None:
        """The neighbour's message is here: decide if that is this peer's part, otherwise promise to
        mix it.
        """
        if self.decides(other.name):
            self.decide(other, round)
        elif self.ledger.state(round, other.name) in (None, "promised"):
            if self.ledger.state(round, other.name) is None:
                self.ledger.record(round, other.name, "promised", other.ledger)
            other.say(Have(round, self.words.ours(other.name, round)))

    def decide(self, other: Neighbour, round: int) -> None:
        """Commit the edge if both messages are here and the other end has promised; repeat an
        earlier decision.

        A promise counts only for the messages that are here. A promise for other messages shows
        that one of the two folders was copied or restored: then the neighbour is not told that the
        edge is committed. Raises Misbehaviour if the promise for the present round is not signed.
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
                self.record(other, round, True, "both messages arrived", promise)
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
            self.record(other, round, False, "the round is over")

    def decided(self, other: Neighbour, told: Decided) -> None:
        """Take the decision of the other end. Raises Misbehaviour if it is not the other end's to
        make.
        """
        if self.decides(other.name):
            raise Misbehaviour(f"it decided round {told.round}, which is not its to decide")
        if self.ledger.state(told.round, other.name) == "promised":
            if told.committed and not self.words.is_theirs(other, told.round, told.signature):
                raise Misbehaviour(
                    f"its decision of round {told.round} is not signed by it, over the messages"
                    " that are here"
                )
            self.record(other, told.round, told.committed, "decided", told.signature)

    def shown(self, other: Neighbour, shown: Shown) -> None:
        """Take this peer's own signature, for a line that its ledger may have lost."""
        if self.words.is_to_restore(other.name, shown, self.since):
            reason = "it showed this peer's own signature, and the ledger had lost the line"
            self.record(other, shown.round, True, reason)

    def record(
        self, other: Neighbour, round: int, committed: bool, reason: str, signature: bytes = b""
    ) -> None:
        """Write a decision down and report it; send it if this peer is the one that decides."""
        self.ledger.record(
            round, other.name, "committed" if committed else "dropped", other.ledger, signature
        )
        self._report(other, round, committed, reason)
        if self.decides(other.name):
            other.say(
                Decided(round, committed, self.words.ours(other.name, round) if committed else b"")
            )
        self.waits.pulse()

    async def settle(self, other: Neighbour, started_at: float) -> None:
        """Wait until this round's edge is decided, or the wait ends; then leave the edge out."""
        round = self.round
        name = round_message(round)

        def state() -> str | None:
            return self.ledger.state(round, other.name)

        reason = await self.waits.until(
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
            self.record(other, round, False, reason)
        else:
            doubt = state() == "promised"
            self._report(other, round, None if doubt else False, reason)

    def _report(self, other: Neighbour, round: int, committed: bool | None, reason: str) -> None:
        self.report(
            EdgeEnded(
                event="edge",
                neighbour=other.name,
                round=round,
                committed=committed,
                reason=reason,
            )
        )
