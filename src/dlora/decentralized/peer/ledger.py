"""What one peer sent, received, promised and decided: on its disk before any neighbour hears of it.

The life of an edge (a, b) with a < b in one round, as its two ledgers see it:

    a, the named end                      b (nothing)                             (nothing)
    either may still leave the edge out (nothing)                             promised       b holds
    a's message and told a so; b is in doubt committed | dropped                   promised       a
    has decided committed | dropped                   committed | dropped
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlora.errors import RunError
from dlora.events.log import RunLog, read_log
from dlora.files import sync_folder, write_atomically

State = Literal["promised", "committed", "dropped"]
_NAME = re.compile(r"(?!\.\.?$)[^/\0]{1,255}")  # of a member: a folder is named by it
_MEND = (
    "restore exchange/ from a copy with all its lines; what is lost here is mixed at the other"
    " ends. Without such a copy, start anew without --resume in another output_dir: this peer then"
    " takes its neighbours' state"
)
_ROUND = re.compile(r"round-(\d{6,})")
_ID = re.compile(r"[0-9a-f]{64}")
# of what an entry may have
_FORMS = {"own": _ID, "theirs": _ID, "ledger": _ID, "signature": re.compile(r"[0-9a-f]{128}")}


def round_message(round: int) -> str:
    """The name of the message a peer sends in a round."""
    return f"round-{round:06d}"


def round_of(message: str) -> int | None:
    """The round of such a name; None for any other message, and for any other spelling: a round has
    one name.
    """
    match = _ROUND.fullmatch(message)
    return int(match[1]) if match and round_message(int(match[1])) == message else None


@dataclass(frozen=True)
class Message:
    """A whole message on this peer's disk."""

    path: Path
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Due:
    """A committed edge whose difference is not in the factors yet."""

    round: int
    neighbour: str
    own: Path  # what this peer sent
    theirs: Path  # what came


@dataclass(frozen=True)
class Word:
    """What the other end of a committed edge has signed."""

    round: int
    ledger: str  # of the other end, which it signed from; empty: an earlier dlora wrote this
    signature: bytes  # empty: there is none


class Ledger:
    """One folder: ``edges.jsonl`` (states, the last line of an edge counts), ``sent/`` and
    ``received/`` (messages), ``id``.

    Each entry has a number and a hash over itself and all before it (``chain``); a promise or a
    commit has the hashes of both messages too, and the neighbour's ledger; a commit also the
    neighbour's signature. ``id`` is drawn once: a copy of the folder has the same, another folder
    of the same peer has another. Everything is synced before a method returns.

    Raises RunError when the disk is full or cannot be written, and when the file is not what was
    written. Entries of dlora 0.1.0, which have no hash, are read as they are. A ledger that has no
    id gets one that follows from its first line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("sent", "received"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        sync_folder(folder)
        path = folder / "edges.jsonl"
        self._log = RunLog(path)  # cuts off a line that a crash tore
        self._entries: list[tuple[int, str, State]] = []
        self._chain = [""]  # the hash at each position
        # of an edge's messages: own, theirs
        self._sums: dict[tuple[int, str], tuple[str, str]] = {}
        self._words: dict[str, dict[int, Word]] = {}  # neighbour -> round -> of its committed edges
        try:
            self._load(path)
            self.id = self._identify(path)
        except RunError:
            self._log.close()
            raise
        self._states: dict[tuple[int, str], State] = {
            (round, name): state for round, name, state in self._entries
        }
        self._own: dict[str, Message] = {}

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    # Messages

    def keep(self, name: str, content: bytes) -> Message:
        """This peer's message ``name``: what is there already stays, for what was once offered
        never changes.
        """
        kept = self.own(name)
        if kept is None:
            write_atomically(self._sent(name), content)
            kept = self._own[name] = Message(
                self._sent(name), len(content), hashlib.sha256(content).hexdigest()
            )
        return kept

    def own(self, name: str) -> Message | None:
        """This peer's message, if it is there."""
        if name not in self._own and self._sent(name).exists():
            self._own[name] = Message(
                self._sent(name), self._sent(name).stat().st_size, file_sha256(self._sent(name))
            )
        return self._own.get(name)

    def newest_round_sent(self) -> int | None:
        """The last round whose message this peer has on disk."""
        rounds = [
            round_of(path.stem) for path in (self.folder / "sent").glob("round-*.safetensors")
        ]
        return max((round for round in rounds if round is not None), default=None)

    def received(self, neighbour: str, name: str) -> Path | None:
        """A neighbour's whole, checked message, if it is there."""
        path = self._received(neighbour, name)
        return path if path.exists() else None

    def partial(self, neighbour: str, name: str, sha256: str) -> Path:
        """Where an incoming message grows. One of another hash, or of another message, from that
        neighbour goes.
        """
        path = self._received(neighbour, name).with_suffix(f".{sha256}.partial")
        path.parent.mkdir(exist_ok=True)
        for other in path.parent.glob("*.partial"):
            if other != path:
                other.unlink()
        return path

    def arrived(self, neighbour: str, name: str, partial: Path) -> None:
        """An incoming message is whole and was checked."""
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self._received(neighbour, name))
        sync_folder(partial.parent)

    def forget_reduction(self) -> None:
        """Remove the messages that are no round's: the end of the run is to be gone through
        again.
        """
        for path in [
            *(self.folder / "sent").glob("*.safetensors"),
            *(self.folder / "received").glob("*/*.safetensors"),
        ]:
            if round_of(path.stem) is None:
                path.unlink()
                self._own.pop(path.stem, None)

    # Edges

    def state(self, round: int, neighbour: str) -> State | None:
        """What is known of an edge."""
        return self._states.get((round, neighbour))

    def record(
        self, round: int, neighbour: str, state: State, ledger: str = "", signature: bytes = b""
    ) -> None:
        """A promise or a decision, durable when this returns. A decision is never taken back.

        ``ledger``: the neighbour's; ``signature``: what it has signed of a committed edge.
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
        self._log.emit(state, **entry, number=self.position + 1, chain=chain)
        _ = self._log.position  # syncs
        self._add({"event": state, **entry})
        self._states[round, neighbour] = state

    def sums(self, round: int, neighbour: str) -> tuple[str, str] | None:
        """The SHA-256 of an edge's two messages, own and theirs; None unless both are here or an
        entry has them.
        """
        if (round, neighbour) in self._sums:
            return self._sums[round, neighbour]
        own, theirs = self.own(round_message(round)), self.received(neighbour, round_message(round))
        return None if own is None or theirs is None else (own.sha256, file_sha256(theirs))

    def is_without_hashes(self, round: int, neighbour: str) -> bool:
        """Whether dlora 0.1.0 wrote the entries of an edge."""
        return (round, neighbour) in self._states and (round, neighbour) not in self._sums

    def known(self, neighbour: str) -> int:
        """1 + the newest round that is promised or committed on an edge; 0: none."""
        rounds = (
            round
            for (round, name), state in self._states.items()
            if name == neighbour and state != "dropped"
        )
        return 1 + max(rounds, default=-1)

    def words(self, neighbour: str) -> list[Word]:
        """What is known of each committed round with a neighbour, the oldest first."""
        words = self._words.get(neighbour, {})
        return [words[round] for round in sorted(words)]

    def chain(self, position: int) -> str:
        """The hash over the entries up to ``position``: what a commit remembers beside it."""
        return self._chain[position]

    def check(self, position: int, chain: str | None, since_round: int) -> None:
        """Raise RunError unless a checkpoint made at ``position``, where the hash was ``chain``,
        can be gone on from here.

        That is: the entries it holds are there, and the messages of those after it are there and
        whole.
        """
        path = self.folder / "edges.jsonl"
        if position > self.position or chain not in (None, self._chain[position]):
            raise RunError(
                f"{path} holds {self.position} entries, and the checkpoint was made after"
                f" {position}{'' if position > self.position else ' others'}; {_MEND}"
            )
        for due in self.due(position, since_round):
            for message, sha256 in zip(
                (due.own, due.theirs),
                self._sums.get((due.round, due.neighbour), (None, None)),
                strict=True,
            ):
                if not message.exists() or sha256 not in (None, file_sha256(message)):
                    what = "is not what was kept" if message.exists() else "is missing"
                    raise RunError(
                        f"{message} {what}, and the edge with {due.neighbour} needs it; {_MEND}"
                    )

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

    def _identify(self, path: Path) -> str:
        """This ledger's id; a new one where there is none."""
        place = self.folder / "id"
        if not place.exists():
            first, newline, _ = path.read_bytes().partition(b"\n")
            write_atomically(
                place, hashlib.sha256(first).hexdigest() if newline else secrets.token_hex(32)
            )
        text = place.read_text(errors="replace")
        if not _ID.fullmatch(text):
            raise RunError(f"{place} is not what was written there; {_MEND}")
        return text

    def _hashed(self, entry: Mapping[str, Any]) -> str:
        told = [
            self._chain[-1],
            *(str(entry.get(key)) for key in ("event", "round", "neighbour", "own", "theirs")),
        ]
        told += [entry[key] for key in ("ledger", "signature") if key in entry]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()

    def in_doubt(self, neighbour: str) -> list[int]:
        """Rounds in which this peer promised and has not heard the decision."""
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
        """How many entries there are: what a commit remembers, so that no difference is added
        twice.
        """
        return len(self._entries)

    def due(self, position: int, since_round: int = 0) -> Iterator[Due]:
        """The edges committed after ``position``, in order; those before ``since_round`` are moot
        (the peer caught up).
        """
        for round, neighbour, state in self._entries[position:]:
            # the last entry of an edge counts, should a write that failed have left one before it
            if state == "committed" == self._states[round, neighbour] and round >= since_round:
                name = round_message(round)
                yield Due(round, neighbour, self._sent(name), self._received(neighbour, name))

    def clean(self, round: int, position: int) -> None:
        """Remove the messages of rounds before ``round`` that nothing can need: no edge of theirs
        is in doubt.

        ``position``: of the older of the two commits that are kept; what came after it stays, so
        that it can be gone on from. The newest own message stays, for a neighbour that catches up.
        """
        keep = {
            round_message(number)
            for (number, _), state in self._states.items()
            if state == "promised"
        }
        keep |= {round_message(number) for number, _, _ in self._entries[position:]}
        newest = self.newest_round_sent()
        for path in [
            *(self.folder / "sent").glob("*.safetensors"),
            *(self.folder / "received").glob("*/*.safetensors"),
        ]:
            number = round_of(path.stem)
            own = path.parent.name == "sent"
            if number is None or number >= round or path.stem in keep or (own and number == newest):
                continue
            path.unlink()
            if own:
                self._own.pop(path.stem, None)

    def _sent(self, name: str) -> Path:
        return self.folder / "sent" / f"{name}.safetensors"

    def _received(self, neighbour: str, name: str) -> Path:
        return self.folder / "received" / neighbour / f"{name}.safetensors"


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex; a chunk at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
