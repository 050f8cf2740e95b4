"""The messages on this peer's disk; each is the content that was written there."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dlora.files import sync_folder, write_atomically

_ROUND = re.compile(r"round-(\d{6,})")
# an earlier dlora wrote no hash into the name
_FILE = re.compile(r"([^.]+)(?:\.([0-9a-f]{64}))?\.safetensors")


def round_message(round: int) -> str:
    """The name of the message that a peer sends in a round."""
    return f"round-{round:06d}"


def round_of(message: str) -> int | None:
    """The round of a message name; None for any other name, also for another spelling of a
    round.
    """
    match = _ROUND.fullmatch(message)
    return int(match[1]) if match and round_message(int(match[1])) == message else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex, read chunk by chunk."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Stamp = tuple[int, int, int]


def stamp_of(path: Path) -> Stamp:
    """What changes when a file is written: its inode, its length, when it was changed."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Message:
    """A whole message on this peer's disk; its file name contains ``sha256``, the hash of its
    content.

    ``stamp``: of its file when the hash was computed.
    """

    path: Path
    num_bytes: int
    sha256: str
    stamp: Stamp

    def is_as_hashed(self) -> bool:
        """Whether the file still has the content with the hash ``sha256``.

        It is read again only if it was written since.
        """
        return stamp_of(self.path) == self.stamp or file_sha256(self.path) == self.sha256


class MessagesOnDisk:
    """``sent/`` and ``received/NEIGHBOUR/`` of one folder. Everything is synced before a method
    returns.

    The files are read once, when the folder is opened. ``damaged``: the messages whose content does
    not have the hash of their name, as (sender, message name); the sender is empty for this peer.
    An earlier dlora wrote no hash into the name; such a file is taken as it is.

    Raises RunError when the disk is full or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("sent", "received"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        sync_folder(folder)
        # (sender, name); the sender is empty for this peer's own
        self._messages: dict[tuple[str, str], Message] = {}
        self.damaged: list[tuple[str, str]] = []
        for path in [
            *(folder / "sent").glob("*.safetensors"),
            *(folder / "received").glob("*/*.safetensors"),
        ]:
            if (parts := _FILE.fullmatch(path.name)) is None:
                continue
            key = ("" if path.parent == folder / "sent" else path.parent.name, parts[1])
            stamp = stamp_of(path)
            message = Message(path, stamp[1], file_sha256(path), stamp)
            if parts[2] not in (None, message.sha256):
                self.damaged.append(key)
            self._messages[key] = message

    def keep(self, name: str, content: bytes) -> Message:
        """Store this peer's message ``name`` and return it.

        A message that is already there stays, because what was offered once never changes.
        """
        kept = self.own(name)
        if kept is None:
            sha256 = hashlib.sha256(content).hexdigest()
            path = self._place("", name, sha256)
            write_atomically(path, content)
            kept = Message(path, len(content), sha256, stamp_of(path))
            self._messages["", name] = kept
        return kept

    def own(self, name: str) -> Message | None:
        """This peer's message, if it is here."""
        return self._messages.get(("", name))

    def newest_round_sent(self) -> int | None:
        """The last round whose message this peer has on disk."""
        rounds = [round_of(name) for sender, name in self._messages if not sender]
        return max((round for round in rounds if round is not None), default=None)

    def received(self, neighbour: str, name: str) -> Message | None:
        """A neighbour's whole and checked message, if it is here."""
        return self._messages.get((neighbour, name))

    def partial(self, neighbour: str, name: str, sha256: str) -> Path:
        """The file to which an incoming message is written.

        Files of that neighbour's other unfinished messages are deleted.
        """
        path = self._place(neighbour, name, sha256).with_suffix(".partial")
        path.parent.mkdir(exist_ok=True)
        for other in path.parent.glob("*.partial"):
            if other != path:
                other.unlink()
        return path

    def arrived(self, neighbour: str, name: str, partial: Path) -> None:
        """Move an incoming message to its place: it is whole and has the hash that was offered."""
        path = partial.with_suffix(".safetensors")
        stamp = stamp_of(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
        sha256 = path.name.split(".")[1]
        self._messages[neighbour, name] = Message(path, stamp[1], sha256, stamp)

    def forget_reduction(self) -> None:
        """Remove the messages that belong to no round: the end of the run will be repeated."""
        for sender, name in [*self._messages]:
            if round_of(name) is None:
                self._forget(sender, name)

    def _forget(self, sender: str, name: str) -> None:
        self._messages.pop((sender, name)).path.unlink(missing_ok=True)

    def _place(self, sender: str, name: str, sha256: str) -> Path:
        folder = self.folder / "received" / sender if sender else self.folder / "sent"
        return folder / f"{name}.{sha256}.safetensors"
