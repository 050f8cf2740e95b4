"""What one peer promised and decided about its edges: on its disk before any neighbour hears of it.

The states of an edge (a, b) with a < b in one round, in its two ledgers; a decides about the edge:

    ledger of a            ledger of b
    (nothing)              (nothing)              both may still leave the edge out
    (nothing)              promised               b holds a's message and told a so; b is in doubt
    committed | dropped    promised               a has decided, b does not know it yet
    committed | dropped    committed | dropped    b has heard the decision
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlora.decentralized.peer.messages_on_disk import MessagesOnDisk, round_message, round_of
from dlora.errors import RunError
from dlora.events.log import JsonLines, read_log
from dlora.events.timed import now
from dlora.files import write_atomically

State = Literal["promised", "committed", "dropped"]
_NAME = re.compile(r"(?!\.\.?$)[^/\0]{1,255}")  # a member's name is also the name of a folder
_MEND = (
    "restore exchange/ from a copy with all its lines; what is lost here is mixed at the other"
    " ends. Without such a copy, start anew without --resume in another output_dir: this peer then"
    " takes its neighbours' state"
)
_ID = re.compile(r"[0-9a-f]{64}")
# the forms of optional fields of an entry
_FORMS = {"own": _ID, "theirs": _ID, "ledger": _ID, "signature": re.compile(r"[0-9a-f]{128}")}


@dataclass(frozen=True)
class Due:
    """A committed edge whose difference is not in the factors yet."""

    round: int
    neighbour: str
    own: Path  # file of the message that this peer sent
    theirs: Path  # file of the message that came


@dataclass(frozen=True)
class Word:
    """What the other end of a committed edge has signed."""

    round: int
    ledger: str  # id of the other end's ledger; empty: an earlier dlora wrote this entry
    signature: bytes  # empty: there is none


class Ledger(MessagesOnDisk):
    """The messages of one folder, with ``edges.jsonl`` (states; the last line of an edge counts)
    and ``id``.

    Each entry has a number and a hash over itself and all entries before it (``chain``). A promise
    or a commit also has the hashes of both messages and the id of the neighbour's ledger; a commit
    also has the neighbour's signature. The id is drawn once: a copy of the folder has the same id,
    another folder of the same peer has another. Everything is synced to disk before a method
    returns.

    Raises RunError when the disk is full or cannot be written, and when anything in the folder is
    not what was written there. Entries of dlora 0.1.0, which have no hash, are read as they are. A
    ledger without an id gets one that follows from its first line.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = folder / "edges.jsonl"
        self._log = JsonLines(path)  # removes a last line that a crash left incomplete
        self._entries: list[tuple[int, str, State]] = []
        self._chain = [""]  # ``chain`` after each number of entries
        # hashes of an edge's messages: own, theirs
        self._sums: dict[tuple[int, str], tuple[str, str]] = {}
        # neighbour -> round -> its word for the committed edge
        self._words: dict[str, dict[int, Word]] = {}
        try:
            self._load(path)
            self.id = self._identify(path)
            self._states: dict[tuple[int, str], State] = {
                (round, name): state for round, name, state in self._entries
            }
            self._refuse_damage()
        except RunError:
            self._log.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    # Edges

    def state(self, round: int, neighbour: str) -> State | None:
        """The state of an edge; None: no entry."""
        return self._states.get((round, neighbour))

    def record(
        self, round: int, neighbour: str, state: State, ledger: str = "", signature: bytes = b""
    ) -> None:
        """Write a promise or a decision, durable when this returns. A decision is never taken back.

        ``ledger``: id of the neighbour's ledger; ``signature``: the neighbour's, for a committed
        edge.
        """
        assert self._states.get((round, neighbour)) in (None, "promised"), "an edge is decided once"
        entry: dict[str, Any] = {"round": round, "neighbour": neighbour}
        sums = self.sums(round, neighbour) if state != "dropped" else None
        if sums is not None:
            entry |= {"own": sums[0], "theirs": sums[1]}
        if state != "dropped" and ledger:
            entry |= {"ledger": ledger}
        if state == "committed" and signature:
            entry |= {"signature": signature.hex()}
        chain = self._hashed({"event": state, **entry})
        self._log.append(
            {"event": state, "time": now(), **entry, "number": self.position + 1, "chain": chain}
        )
        _ = self._log.position  # reading the position syncs the log to disk
        self._add({"event": state, **entry})
        self._states[round, neighbour] = state

    def sums(self, round: int, neighbour: str) -> tuple[str, str] | None:
        """The SHA-256 of an edge's two messages, own and theirs.

        None unless an entry has them or both messages are here.
        """
        if (round, neighbour) in self._sums:
            return self._sums[round, neighbour]
        own, theirs = self.own(round_message(round)), self.received(neighbour, round_message(round))
        return None if own is None or theirs is None else (own.sha256, theirs.sha256)

    def is_without_hashes(self, round: int, neighbour: str) -> bool:
        """Whether the entries of an edge have no hashes, as dlora 0.1.0 wrote them."""
        return (round, neighbour) in self._states and (round, neighbour) not in self._sums

    def known(self, neighbour: str) -> int:
        """1 + the newest round that is promised or committed with ``neighbour``; 0: none."""
        rounds = (
            round
            for (round, name), state in self._states.items()
            if name == neighbour and state != "dropped"
        )
        return 1 + max(rounds, default=-1)

    def words(self, neighbour: str) -> list[Word]:
        """The neighbour's word for each committed round with it, oldest first."""
        words = self._words.get(neighbour, {})
        return [words[round] for round in sorted(words)]

    def chain(self, position: int) -> str:
        """The hash over the entries up to ``position``; a commit keeps it."""
        return self._chain[position]

    def check(self, position: int, chain: str | None, since_round: int) -> None:
        """Raise RunError unless a run can go on from a checkpoint made at ``position`` with the
        hash ``chain``.

        The entries that the checkpoint holds must be here, and the messages of later entries must
        be here and whole.
        """
        path = self.folder / "edges.jsonl"
        if position > self.position or chain not in (None, self._chain[position]):
            raise RunError(
                f"{path} holds {self.position} entries, and the checkpoint was made after"
                f" {position}{'' if position > self.position else ' others'}; {_MEND}"
            )
        for _ in self.due(position, since_round):
            pass

    def _load(self, path: Path) -> None:
        for number, entry in enumerate(_read(path), start=1):
            self._add(entry)
            if entry.get("chain", self._chain[-1]) != self._chain[-1]:
                raise RunError(
                    f"{path}, line {number} is not the line that was written there, or one before"
                    f" it is gone; {_MEND}"
                )

    def _add(self, entry: Mapping[str, Any]) -> None:
        self._chain.append(self._hashed(entry))
        edge = (entry["round"], entry["neighbour"])
        self._entries.append((*edge, entry["event"]))
        if "own" in entry:
            self._sums[edge] = (entry["own"], entry["theirs"])
        if entry["event"] == "committed":
            word = Word(
                entry["round"], entry.get("ledger", ""), bytes.fromhex(entry.get("signature", ""))
            )
            self._words.setdefault(entry["neighbour"], {})[word.round] = word

    def _refuse_damage(self) -> None:
        """Raise RunError if a message is not what its name or an entry says."""
        for (round, neighbour), sums in self._sums.items():
            for sender, sha256 in zip(("", neighbour), sums, strict=True):
                message = self._messages.get((sender, round_message(round)))
                if message is None or self._states[round, neighbour] == "dropped":
                    continue
                if message.sha256 != sha256:
                    raise RunError(_damaged(message.path, neighbour))
        for sender, name in self.damaged:
            path = self._messages[sender, name].path
            if not sender and round_of(name) is not None:
                raise RunError(f"{path} is not what was kept, and neighbours may have it; {_MEND}")
            comes = f"{sender} sends it again" if sender else "it is made again"
            raise RunError(
                f"{path} is not what was kept; remove that file, then add --resume: {comes} if it"
                " is needed"
            )

    def _identify(self, path: Path) -> str:
        """This ledger's id; a new one is made if there is none."""
        place = self.folder / "id"
        if not place.exists():
            first, newline, _ = path.read_bytes().partition(b"\n")
            drawn = hashlib.sha256(first).hexdigest() if newline else secrets.token_hex(32)
            write_atomically(place, f"{drawn}\n{_sha256(drawn)}\n")
        id, _, checksum = place.read_text(errors="replace").partition("\n")
        # an earlier dlora wrote no checksum
        if not _ID.fullmatch(id) or checksum not in ("", f"{_sha256(id)}\n"):
            raise RunError(f"{place} is not what was written there; {_MEND}")
        return id

    def _hashed(self, entry: Mapping[str, Any]) -> str:
        told = [
            self._chain[-1],
            *(str(entry.get(key)) for key in ("event", "round", "neighbour", "own", "theirs")),
        ]
        told += [entry[key] for key in ("ledger", "signature") if key in entry]
        return _sha256("\n".join(told))

    def in_doubt(self, neighbour: str) -> list[int]:
        """The rounds in which this peer has promised and does not know the decision yet."""
        return [
            round
            for (round, name), state in self._states.items()
            if name == neighbour and state == "promised"
        ]

    def committed(self) -> set[tuple[int, str]]:
        """Every committed (round, neighbour)."""
        return {edge for edge, state in self._states.items() if state == "committed"}

    @property
    def position(self) -> int:
        """The number of entries. A commit keeps it, so that no difference is added twice."""
        return len(self._entries)

    def due(self, position: int, since_round: int = 0) -> Iterator[Due]:
        """The edges committed after ``position``, in order, without rounds before ``since_round``.

        Raises RunError if a message of such an edge is missing or is not the one that was signed.
        """
        for round, neighbour, state in self._entries[position:]:
            # only the last entry of an edge counts; a failed write may have left one before it
            if state == "committed" == self._states[round, neighbour] and round >= since_round:
                sums = self._sums.get((round, neighbour), (None, None))
                own, theirs = (
                    self._read_through(sender, round_message(round), sha256, neighbour)
                    for sender, sha256 in zip(("", neighbour), sums, strict=True)
                )
                yield Due(round, neighbour, own, theirs)

    def clean(self, round: int, position: int) -> None:
        """Remove the messages of rounds before ``round`` that no edge can need any more.

        ``position``: of the older of the two commits that are kept; messages of later entries stay,
        so that a run can go on from it. This peer's newest message stays too, for a neighbour that
        catches up.
        """
        keep = {
            round_message(number)
            for (number, _), state in self._states.items()
            if state == "promised"
        }
        keep |= {round_message(number) for number, _, _ in self._entries[position:]}
        newest = self.newest_round_sent()
        for sender, name in [*self._messages]:
            number = round_of(name)
            if number is None or number >= round or name in keep:
                continue
            if sender or number != newest:
                self._forget(sender, name)

    def _read_through(self, sender: str, name: str, sha256: str | None, neighbour: str) -> Path:
        """The file of a message that the edge with ``neighbour`` needs, after its hash was
        checked.
        """
        message = self._messages.get((sender, name))
        if message is None or not message.path.exists():
            place = self._place(sender, name, sha256 or "") if message is None else message.path
            raise RunError(_damaged(place, neighbour, "is missing"))
        if message.sha256 != (sha256 or message.sha256) or not message.is_as_hashed():
            raise RunError(_damaged(message.path, neighbour))
        return message.path


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path, neighbour: str, what: str = "is not what was kept") -> str:
    return f"{path} {what}, and the edge with {neighbour} needs it; {_MEND}"


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries = read_log(path)
    except RunError as error:
        raise RunError(f"{str(error).rpartition('; ')[0]}; {_MEND}") from error
    for number, entry in enumerate(entries, start=1):
        round, neighbour = entry.get("round"), entry.get("neighbour")
        known = entry["event"] in ("promised", "committed", "dropped")
        known = known and all(
            form.fullmatch(str(entry[key])) for key, form in _FORMS.items() if key in entry
        )
        known = known and ("own" in entry) == ("theirs" in entry)
        if (
            not known
            or type(round) is not int
            or round < 0
            or not isinstance(neighbour, str)
            or not _NAME.fullmatch(neighbour)
        ):
            raise RunError(f"{path}, line {number} is no promise and no decision; {_MEND}")
    return entries
