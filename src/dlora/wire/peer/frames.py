"""What two peers say to each other, frame by frame; how a frame travels is the wire's business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

MAX_CHUNK_BYTES = 1 << 18  # of payload in one frame: a chunk is a sign of life, on slow lines too
SIGNATURE_BYTES = 64  # ECDSA on P-256: r and s, 32 bytes each


@dataclass(frozen=True)
class Hello:
    """The first frame each end sends on a link: which run it is in, and where."""

    manifest_hash: str  # SHA-256 of the manifest, hex
    manifest: str  # canonical JSON, so that a mismatch can be named
    round: int  # the round it is in
    # drawn when its ledger was made, hex: a copy has the same, a folder that is started anew has
    # another
    ledger: str
    known: int = 0  # 1 + the newest round that it holds promised or committed on this edge; 0: none
    # the round to which it last caught up: what it lacks before that is in the state it took
    since: int = 0


@dataclass(frozen=True)
class Status:
    """Alive, and in this round: sent when a round begins and again while nothing else is said."""

    round: int


@dataclass(frozen=True)
class Offer:
    """A message is ready. A round's never changes; the end's may, when it is gone through again:
    the hash decides.
    """

    name: str  # of the message, such as round-000012
    num_bytes: int
    sha256: str  # of the whole message, hex


@dataclass(frozen=True)
class Want:
    """Send the offered message from this byte on."""

    name: str
    offset: int


@dataclass(frozen=True)
class Chunk:
    """Part of a message, in order."""

    name: str
    offset: int
    data: bytes  # at most MAX_CHUNK_BYTES


@dataclass(frozen=True)
class Have:
    """The promise: your message of this round is on my disk, and I mix it if you decide so (again
    on every new link).
    """

    round: int
    signature: bytes = b""  # of `word.statement`, by the sender


@dataclass(frozen=True)
class Decided:
    """The decision about (this edge, this round), by the edge's named end, after it is on that
    end's disk.
    """

    round: int
    committed: bool
    signature: bytes = b""  # of `word.statement`, by the sender, when it is committed


@dataclass(frozen=True)
class Shown:
    """You promised or committed this, and your Hello lacks it: here is your own signature."""

    round: int
    ledger: str  # of the receiver's ledgers: the one that it signed from
    own: str  # SHA-256 of the sender's message, hex
    theirs: str  # of the receiver's
    signature: bytes  # the receiver's own


Frame: TypeAlias = Hello | Status | Offer | Want | Chunk | Have | Decided | Shown
