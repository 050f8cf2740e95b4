"""What one peer sent, received, promised and decided: on its disk before any neighbour hears of it.

The life of an edge (a, b) with a < b in one round, as its two ledgers see it:

    a, the named end                      b
    (nothing)                             (nothing)      either may still leave the edge out
    (nothing)                             promised       b holds a's message and told a so; b is in doubt
    committed | dropped                   promised       a has decided
    committed | dropped                   committed | dropped
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlora.runlog import RunLog, read_log, sync_folder, write_atomically

State = Literal["promised", "committed", "dropped"]
_ROUND = re.compile(r"round-(\d{6,})")


def round_message(round: int) -> str:
    """The name of the message a peer sends in a round."""
    return f"round-{round:06d}"


def round_of(message: str) -> int | None:
    """The round of such a name; None for any other message, and for any other spelling: a round has one name."""
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


class Ledger:
    """One folder: ``edges.jsonl`` (states, the last line of an edge counts), ``sent/`` and ``received/`` (messages).

    Everything is synced before a method returns. Raises RunError when the disk is full or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("sent", "received"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        sync_folder(folder)
        path = folder / "edges.jsonl"
        self._log = RunLog(path)  # cuts off a line that a crash tore
        self._entries: list[tuple[int, str, State]] = [
            (entry["round"], entry["neighbour"], entry["event"]) for entry in read_log(path)
        ]
        self._states: dict[tuple[int, str], State] = {(round, name): state for round, name, state in self._entries}
        self._own: dict[str, Message] = {}

    def close(self) -> None:
        """Close the file."""
        self._log.close()

    # Messages

    def keep(self, name: str, content: bytes) -> Message:
        """This peer's message ``name``: what is there already stays, for what was once offered never changes."""
        kept = self.own(name)
        if kept is None:
            write_atomically(self._sent(name), content)
            kept = self._own[name] = Message(self._sent(name), len(content), hashlib.sha256(content).hexdigest())
        return kept

    def own(self, name: str) -> Message | None:
        """This peer's message, if it is there."""
        if name not in self._own and self._sent(name).exists():
            self._own[name] = Message(self._sent(name), self._sent(name).stat().st_size, file_sha256(self._sent(name)))
        return self._own.get(name)

    def newest_round_sent(self) -> int | None:
        """The last round whose message this peer has on disk."""
        rounds = [round_of(path.stem) for path in (self.folder / "sent").glob("round-*.safetensors")]
        return max((round for round in rounds if round is not None), default=None)

    def received(self, neighbour: str, name: str) -> Path | None:
        """A neighbour's whole, checked message, if it is there."""
        path = self._received(neighbour, name)
        return path if path.exists() else None

    def partial(self, neighbour: str, name: str, sha256: str) -> Path:
        """Where an incoming message grows. One of another hash, or of another message, from that neighbour goes."""
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
        """Remove the messages that are no round's: the end of the run is to be gone through again."""
        for path in [*(self.folder / "sent").glob("*.safetensors"), *(self.folder / "received").glob("*/*.safetensors")]:
            if round_of(path.stem) is None:
                path.unlink()
                self._own.pop(path.stem, None)

    # Edges

    def state(self, round: int, neighbour: str) -> State | None:
        """What is known of an edge."""
        return self._states.get((round, neighbour))

    def record(self, round: int, neighbour: str, state: State) -> None:
        """A promise or a decision, durable when this returns. A decision is never taken back."""
        assert self._states.get((round, neighbour)) in (None, "promised"), "an edge is decided once"
        self._log.emit(state, round=round, neighbour=neighbour)
        _ = self._log.position  # syncs
        self._entries.append((round, neighbour, state))
        self._states[round, neighbour] = state

    def in_doubt(self, neighbour: str) -> list[int]:
        """Rounds in which this peer promised and has not heard the decision."""
        return [round for (round, name), state in self._states.items() if name == neighbour and state == "promised"]

    def committed(self) -> set[tuple[int, str]]:
        """Every committed (round, neighbour)."""
        return {edge for edge, state in self._states.items() if state == "committed"}

    @property
    def position(self) -> int:
        """How many entries there are: what a commit remembers, so that no difference is added twice."""
        return len(self._entries)

    def due(self, position: int, since_round: int = 0) -> Iterator[Due]:
        """The edges committed after ``position``, in order; those before ``since_round`` are moot (the peer caught up)."""
        for round, neighbour, state in self._entries[position:]:
            # the last entry of an edge counts, should a write that failed have left one before it
            if state == "committed" == self._states[round, neighbour] and round >= since_round:
                name = round_message(round)
                yield Due(round, neighbour, self._sent(name), self._received(neighbour, name))

    def clean(self, round: int) -> None:
        """Remove the messages of rounds before ``round`` that nothing can need: no edge of theirs is in doubt.

        Call it once a commit holds everything that was due. The newest own message stays, for a neighbour that catches up.
        """
        keep = {round_message(number) for (number, _), state in self._states.items() if state == "promised"}
        newest = self.newest_round_sent()
        for path in [*(self.folder / "sent").glob("*.safetensors"), *(self.folder / "received").glob("*/*.safetensors")]:
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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex; a chunk at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
