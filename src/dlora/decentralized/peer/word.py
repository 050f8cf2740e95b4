"""What a peer signs about its edges, and what it shows to a neighbour whose folder lacks what it
has signed.

Rounds are promised and committed in order, and each is on its signer's disk before it is signed. So
a ledger that lacks a round that its own peer has signed is an older copy, or one of two copies that
are in use at once. A claim proves nothing: without the peer's own signature, made from that very
ledger, nobody can end it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Protocol

from dlora.decentralized.peer.ledger import Ledger, Word
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.errors import RunError
from dlora.wire.frame import Misbehaviour
from dlora.wire.peer.frames import Hello, Shown

MAX_SHOWN = 8  # the newest; the first that cannot be restored says enough


class Signatures(Protocol):
    """Signatures of members; who has which key is the network's business."""

    def sign(self, statement: bytes) -> bytes:
        """This peer's signature, ``SIGNATURE_BYTES`` long; the same statement gives the same
        one.
        """

    def is_signed(self, name: str, statement: bytes, signature: bytes) -> bool:
        """Whether the member ``name`` has signed the statement; never an error, whatever the bytes
        are.
        """


def statement(
    run: str, signer: str, ledger: str, other: str, round: int, own: str, theirs: str
) -> bytes:
    """What ``signer`` signs from its ``ledger`` about its edge with ``other``: it holds both
    messages of this round.

    ``own``, ``theirs``: SHA-256 of the signer's message and of the other's. The smaller of the two
    names has committed the edge, the larger has promised to mix it if the smaller decides so.
    """
    what = "committed" if signer < other else "promised"
    return json.dumps(["dlora edge", run, signer, ledger, other, round, what, own, theirs]).encode()


class Words:
    """The word of the peer ``name``, and that of its neighbours."""

    def __init__(
        self,
        name: str,
        run: str,
        ledger: Ledger,
        signatures: Signatures,
        report: Callable[..., object],
    ) -> None:
        self.name, self.run, self.ledger, self.signatures, self.report = (
            name,
            run,
            ledger,
            signatures,
            report,
        )

    def ours(self, neighbour: str, round: int) -> bytes:
        """This peer's signature for an edge of its ledger; none where dlora 0.1.0 kept no hashes
        and the messages are gone.
        """
        sums = self.ledger.sums(round, neighbour)
        if sums is None:
            return b""
        return self.signatures.sign(
            statement(self.run, self.name, self.ledger.id, neighbour, round, *sums)
        )

    def is_theirs(self, other: Neighbour, round: int, signature: bytes) -> bool:
        """Whether a neighbour has signed an edge as it is here; of what dlora 0.1.0 wrote that
        cannot be asked for.
        """
        sums = self.ledger.sums(round, other.name)
        if sums is None or not signature:
            return self.ledger.is_without_hashes(round, other.name)
        return self._has_signed(other.name, Word(round, other.ledger, signature), *sums)

    def _has_signed(self, neighbour: str, word: Word, own: str, theirs: str) -> bool:
        told = statement(self.run, neighbour, word.ledger, self.name, word.round, theirs, own)
        return self.signatures.is_signed(neighbour, told, word.signature)

    def _shown(self, neighbour: str, word: Word) -> Shown | None:
        """What to show of an edge: nothing without a signature, or where its key is in the
        federation file no more.
        """
        sums = self.ledger.sums(word.round, neighbour)
        if sums is None or not word.signature or not self._has_signed(neighbour, word, *sums):
            return None
        return Shown(word.round, word.ledger, *sums, word.signature)

    def abandoned(self, neighbour: str, hello: Hello) -> Shown | None:
        """The proof for a neighbour that comes with a ledger after which it has used another one:
        its own signature from that other ledger. None for all other neighbours.
        """
        words = self.ledger.words(neighbour)
        if (
            not words
            or words[-1].ledger in ("", hello.ledger)
            or all(word.ledger != hello.ledger for word in words)
        ):
            return None
        return self._shown(neighbour, words[-1])

    def lacking(self, neighbour: str, hello: Hello) -> list[Shown]:
        """What to show to a neighbour of the edges that are committed here and that its ledger
        lacks; reported.

        A folder that is started anew has another ledger: it lacks nothing, because it takes its
        neighbours' state.
        """
        words = [
            word
            for word in self.ledger.words(neighbour)
            if word.round >= max(hello.known, hello.since)
        ]
        words = [
            word
            for word in words
            if word.ledger == hello.ledger or (not word.ledger and hello.known)
        ]
        found = (
            told for word in reversed(words) if (told := self._shown(neighbour, word)) is not None
        )
        shown = list(itertools.islice(found, MAX_SHOWN))
        if words:
            first, last = words[0].round, words[-1].round
            which = f"round {first}" if first == last else f"rounds {first} to {last}"
            reason = (
                f"its folder does not hold what is mixed here of {which}: it is an older copy, or"
                " its key is used twice"
            )
            self.report(
                "lacks",
                neighbour=neighbour,
                round=last,
                edges=len(words),
                shown=len(shown),
                reason=reason,
            )
        return shown

    def is_to_restore(self, neighbour: str, shown: Shown, since: int) -> bool:
        """Whether the ledger has lost the line of an edge whose messages are both here, so that it
        can be mixed after all.

        Raises Misbehaviour when this peer has not signed that, RunError when the edge is lost to
        this folder.
        """
        word = Word(shown.round, shown.ledger, shown.signature)
        told = statement(
            self.run, self.name, word.ledger, neighbour, word.round, shown.theirs, shown.own
        )
        if not self.signatures.is_signed(self.name, told, word.signature):
            raise Misbehaviour(
                f"it showed a signature for round {word.round} that this peer has not made"
            )
        if word.ledger != self.ledger.id:  # it may be as old as it likes: it ends nobody
            reason = (
                f"it has {self.name}'s signature for round {word.round} from another folder than"
                f" {self.ledger.folder.parent}: stop the other machine that runs as {self.name}, or"
                " go on with the folder that was used last"
            )
            self.report("two-folders", neighbour=neighbour, reason=reason)
            return False
        state = self.ledger.state(word.round, neighbour)
        # what became of it the neighbour has decided
        promised_only = self.name > neighbour and state is not None
        if state == "committed" or promised_only or word.round < since:
            return False
        if state is None and self.ledger.sums(word.round, neighbour) == (shown.theirs, shown.own):
            return True
        known = self.ledger.known(neighbour)
        holds = f"ends with round {known - 1}" if known else "holds no round"
        raise RunError(
            f"{self.ledger.folder.parent} is an older copy, or the key of {self.name} is used on"
            f" another machine too: {neighbour} has {self.name}'s signature for round {word.round},"
            f" and this folder {holds} with {neighbour}; restore the newest copy and add --resume,"
            " or stop the other machine, or start anew without --resume in another output_dir:"
            f" {self.name} then takes its neighbours' state"
        )
