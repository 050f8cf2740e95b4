"""What a peer signs about its edges, and what it shows to a neighbour whose ledger lacks such an
edge.

Rounds are promised and committed in order, and each is on the signer's disk before it is signed. If
a ledger lacks a round that its own peer has signed, the ledger is an older copy, or one of two
copies that are used at the same time. A claim alone proves nothing: a peer stops only when it sees
its own signature, made from this very ledger.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Protocol

from dlora.decentralized.peer.ledger import Ledger, Word
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.errors import RunError
from dlora.events.neighbours import Lacks, NeighbourEvent, TwoFolders
from dlora.wire.frame import Misbehaviour
from dlora.wire.peer.frames import Hello, Shown

MAX_SHOWN = 8  # only the newest are shown; one that cannot be restored is enough to stop the peer


class Signatures(Protocol):
    """Makes and checks signatures of members; the implementation knows the keys."""

    def sign(self, statement: bytes) -> bytes:
        """This peer's signature, ``SIGNATURE_BYTES`` long; the same statement always gives the same
        one.
        """

    def is_signed(self, name: str, statement: bytes, signature: bytes) -> bool:
        """Whether the member ``name`` has signed the statement. No bytes make it raise."""


def statement(
    run: str, signer: str, ledger: str, other: str, round: int, own: str, theirs: str
) -> bytes:
    """The bytes that ``signer`` signs from its ``ledger`` about its edge with ``other`` in
    ``round``: it holds both messages.

    ``own``, ``theirs``: SHA-256 of the signer's message and of the other's. The peer with the
    smaller name has committed the edge; the other has promised to mix it if the first decides so.
    """
    what = "committed" if signer < other else "promised"
    return json.dumps(["dlora edge", run, signer, ledger, other, round, what, own, theirs]).encode()


class Words:
    """Signed statements about edges: those of the peer ``name``, and those of its neighbours."""

    def __init__(
        self,
        name: str,
        run: str,
        ledger: Ledger,
        signatures: Signatures,
        report: Callable[[NeighbourEvent], object],
    ) -> None:
        self.name, self.run, self.ledger, self.signatures, self.report = (
            name,
            run,
            ledger,
            signatures,
            report,
        )

    def ours(self, neighbour: str, round: int) -> bytes:
        """This peer's signature for an edge of its ledger.

        Empty if dlora 0.1.0 wrote the edge, which kept no hashes, and the messages are gone.
        """
        sums = self.ledger.sums(round, neighbour)
        if sums is None:
            return b""
        return self.signatures.sign(
            statement(self.run, self.name, self.ledger.id, neighbour, round, *sums)
        )

    def is_theirs(self, other: Neighbour, round: int, signature: bytes) -> bool:
        """Whether a neighbour has signed an edge as this ledger has it.

        An edge that dlora 0.1.0 wrote has no signature, and none is asked for.
        """
        sums = self.ledger.sums(round, other.name)
        if sums is None or not signature:
            return self.ledger.is_without_hashes(round, other.name)
        return self._has_signed(other.name, Word(round, other.ledger, signature), *sums)

    def _has_signed(self, neighbour: str, word: Word, own: str, theirs: str) -> bool:
        told = statement(self.run, neighbour, word.ledger, self.name, word.round, theirs, own)
        return self.signatures.is_signed(neighbour, told, word.signature)

    def _shown(self, neighbour: str, word: Word) -> Shown | None:
        """What to show of an edge; None without a signature that the neighbour's present key
        confirms.
        """
        sums = self.ledger.sums(word.round, neighbour)
        if sums is None or not word.signature or not self._has_signed(neighbour, word, *sums):
            return None
        return Shown(word.round, word.ledger, *sums, word.signature)

    def abandoned(self, neighbour: str, hello: Hello) -> Shown | None:
        """The proof for a neighbour that uses an old ledger again after it has used another one.

        It is the neighbour's own signature from that other ledger. None for all other neighbours.
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
        """What to show to a neighbour: edges that are committed here and that its ledger lacks.

        The lack is reported. A neighbour whose folder was started anew has another ledger and lacks
        nothing, because it takes its neighbours' state.
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
                Lacks(
                    event="lacks",
                    neighbour=neighbour,
                    round=last,
                    edges=len(words),
                    shown=len(shown),
                    reason=reason,
                )
            )
        return shown

    def is_to_restore(self, neighbour: str, shown: Shown, since: int) -> bool:
        """Whether this ledger has lost the line of an edge but both messages are here: it can still
        be mixed.

        Raises Misbehaviour if this peer has not signed what is shown, RunError if this folder
        cannot restore the edge.
        """
        word = Word(shown.round, shown.ledger, shown.signature)
        told = statement(
            self.run, self.name, word.ledger, neighbour, word.round, shown.theirs, shown.own
        )
        if not self.signatures.is_signed(self.name, told, word.signature):
            raise Misbehaviour(
                f"it showed a signature for round {word.round} that this peer has not made"
            )
        # a statement from another ledger may be old, so it does not stop this peer
        if word.ledger != self.ledger.id:
            reason = (
                f"it has {self.name}'s signature for round {word.round} from another folder than"
                f" {self.ledger.folder.parent}: stop the other machine that runs as {self.name}, or"
                " go on with the folder that was used last"
            )
            self.report(TwoFolders(event="two-folders", neighbour=neighbour, reason=reason))
            return False
        state = self.ledger.state(word.round, neighbour)
        # the neighbour decides about this edge, and sends its decision in another frame
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
