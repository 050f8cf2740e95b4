"""One neighbour as it is now: its link, what is to be said to it, and the message that is coming
from it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dlora.decentralized.peer.belief import Implausible
from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages_on_disk import file_sha256
from dlora.wire.frame import Link, Misbehaviour
from dlora.wire.peer.frames import MAX_CHUNK_BYTES, Chunk, Frame, Offer, Status, Want


@dataclass
class Neighbour:
    """What is known of one neighbour now.

    Its attributes are all that this peer knows of one other peer.
    """

    name: str
    link: Link | None = None
    round: int | None = None  # it was in when it last spoke
    heard_at: float = float("-inf")  # loop time of its last frame
    away: bool = False  # given up; not waited for until it links again
    stalls: int = 0  # rounds in a row in which it was there and delivered nothing
    disbelieved: bool = False  # on this link: it says that it is far ahead
    refused: str | None = None  # why it is not in this run
    # its latest round's, and any others by name
    offers: dict[str, Offer] = field(default_factory=dict)
    ledger: str = ""  # of the folder that it runs from, as it said on this link
    # rounds whose message of ours it holds -> its signature
    promised: dict[int, bytes] = field(default_factory=dict)
    # messages of it that are not taken, and why
    implausible: dict[str, str] = field(default_factory=dict)
    incoming: Offer | None = None  # being fetched on this link
    began: int = 0  # the bytes of it that had been here before
    stored_at: float = float("-inf")  # loop time of the last chunk of it
    queue: deque[Frame] = field(default_factory=deque)  # to be said on this link
    outgoing: tuple[str, int] | None = None  # our message it wants, and from which byte on
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    # the wire has taken what was queued
    all_said: asyncio.Event = field(default_factory=asyncio.Event)

    def linked(self, link: Link) -> None:
        """A new link: what was under way on the last one starts again from what is on disk."""
        self.link, self.round, self.refused, self.disbelieved = link, None, None, False
        self.queue, self.outgoing, self.incoming = deque(), None, None
        self.all_said.set()
        self.offers.clear()
        self.promised.clear()

    def say(self, frame: Frame) -> None:
        """Queue a frame; without a link it is lost, and said again on the next where that
        matters.
        """
        # so that who asks again and again fills no memory
        if self.link is not None and frame not in self.queue:
            self.queue.append(frame)
            self.wake.set()
            self.all_said.clear()

    async def write(
        self, link: Link, ledger: Ledger, round: Callable[[], int], beat_s: float
    ) -> None:
        """Send what is queued, then what is wanted, chunk by chunk; with neither, every ``beat_s``,
        the round we are in.
        """
        queue = self.queue  # of this link; the next has another
        while True:
            if queue:
                await link.send(queue.popleft())
                if not queue and self.queue is queue:
                    self.all_said.set()
            elif self.outgoing is not None:
                name, offset = self.outgoing
                message = ledger.own(name)
                if message is None or offset >= message.num_bytes:
                    self.outgoing = None
                    continue
                with open(message.path, "rb") as file:
                    file.seek(offset)
                    data = file.read(MAX_CHUNK_BYTES)
                self.outgoing = (name, offset + len(data))
                await link.send(Chunk(name, offset, data))
            else:
                self.wake.clear()
                try:
                    async with asyncio.timeout(beat_s):
                        await self.wake.wait()
                except TimeoutError:
                    await link.send(Status(round()))

    def fetch(self, offer: Offer, ledger: Ledger) -> None:
        """Ask for an offered message, from the byte that is not here yet."""
        if self.incoming == offer:
            return
        self.incoming = offer
        partial = ledger.partial(self.name, offer.name, offer.sha256)
        have = partial.stat().st_size if partial.exists() else 0
        if have == offer.num_bytes:  # whole, but it was not checked to the end
            have = 0
            partial.unlink()
        self.began = have
        self.say(Want(offer.name, have))

    def store(
        self, chunk: Chunk, ledger: Ledger, check: Callable[[str, str, Path], object]
    ) -> bool:
        """Append to the message that is coming; once it is whole, check it. Returns whether one has
        arrived.

        Raises Misbehaviour for what no peer sends, Implausible for a message that ``check`` does
        not believe.
        """
        offer, name = self.incoming, chunk.name
        if offer is None or offer.name != name:
            return False  # asked for once, and no longer
        partial = ledger.partial(self.name, name, offer.sha256)
        have = partial.stat().st_size if partial.exists() else 0
        if chunk.offset != have or have + len(chunk.data) > offer.num_bytes:
            raise Misbehaviour(
                f"it sent bytes from {chunk.offset} of {name}, expected from {have} of"
                f" {offer.num_bytes}"
            )
        with open(partial, "ab") as file:
            file.write(chunk.data)
        self.stored_at = asyncio.get_running_loop().time()
        if have + len(chunk.data) < offer.num_bytes:
            return False
        self.incoming = None
        try:
            if file_sha256(partial) != offer.sha256:
                if self.began:  # what lay here since an earlier link may be damaged: all anew
                    partial.unlink()
                    self.fetch(offer, ledger)
                    return False
                raise ValueError("it is not the content that was offered")
            check(self.name, name, partial)
        except Implausible as error:
            partial.unlink()
            self.implausible[name] = str(error)
            raise
        except ValueError as error:
            partial.unlink()  # the neighbour may offer it again, whole
            raise Misbehaviour(f"its {name}: {error}") from error
        ledger.arrived(self.name, name, partial)
        return True
