"""The frames that two peers send to each other, and what each means; codec.py writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

# Limit for the payload in one frame. It is small, so that a peer on a slow line sends a frame often
# enough not to count as silent.
MAX_CHUNK_BYTES = 1 << 18
SIGNATURE_BYTES = 64  # ECDSA on P-256: r and s, 32 bytes each


@dataclass(frozen=True)
class Hello:
    """The first frame that each end sends on a link: its run, and how far it is in it."""

    manifest_hash: str  # SHA-256 of the manifest, hex
    manifest: str  # canonical JSON; the receiver can say which key differs
    round: int  # the sender's current round
    # A random hex id of the sender's ledger. A copied ledger has the same id; a run folder that
    # starts again from nothing has another.
    ledger: str
    # 1 + the newest round that the sender's ledger holds as promised or committed on this edge;
    # 0: none
    known: int = 0
    # The round to which the sender last caught up. It has no entries for earlier rounds, because it
    # took a neighbour's state instead.
    since: int = 0


@dataclass(frozen=True)
class Status:
    """The sender is alive, and in this round.

    It is sent when a round begins, and again while there is nothing else to send.
    """

    round: int


@dataclass(frozen=True)
class Offer:
    """The sender has a message ready.

    The message of a round never changes. The message at the end of the run can change when a
    resumed peer makes it again; the receiver compares the hash.
    """

    name: str  # the name of the message, for example round-000012
    num_bytes: int
    sha256: str  # SHA-256 of the whole message, hex


@dataclass(frozen=True)
class Want:
    """A request: send the offered message from byte ``offset`` on."""

    name: str
    offset: int


@dataclass(frozen=True)
class Chunk:
    """A part of a message. The parts are sent in order."""

    name: str
    offset: int
    data: bytes  # at most MAX_CHUNK_BYTES


@dataclass(frozen=True)
class Have:
    """A promise: the receiver's message of this round is on the sender's disk.

    The sender mixes it if the receiver decides so. The promise is repeated on every new link.
    """

    round: int
    signature: bytes = b""  # the sender's signature of `word.statement`


@dataclass(frozen=True)
class Decided:
    """The decision about this edge in this round.

    One end of each edge decides. It sends the decision after it has written it to its disk.
    """

    round: int
    committed: bool
    signature: bytes = b""  # the sender's signature of `word.statement`, if committed


@dataclass(frozen=True)
class Shown:
    """Proof that the receiver promised or committed a round that its Hello does not contain.

    The sender returns the receiver's own signature.
    """

    round: int
    ledger: str  # the id of the ledger with which the receiver signed
    own: str  # SHA-256 of the sender's message, hex
    theirs: str  # SHA-256 of the receiver's message, hex
    signature: bytes  # the receiver's signature


Frame: TypeAlias = Hello | Status | Offer | Want | Chunk | Have | Decided | Shown
