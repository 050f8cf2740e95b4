"""One neighbour as it is now: its link, the frames for it, and the message that comes from it."""

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
    """What this peer knows of one neighbour now.

    Its attributes are all that this peer knows of one other peer.
    """

    name: str
    link: Link | None = None
    round: int | None = None  # the round that it last said it was in
    heard_at: float = float("-inf")  # loop time of its last frame
    away: bool = False  # this peer does not wait for it until it links again
    stalls: int = 0  # rounds in a row in which it had a link and delivered nothing
    disbelieved: bool = False  # on this link it said that it is far ahead, and was not believed
    refused: str | None = None  # why it does not belong to this run
    # the offer of its latest round ("round"), and other offers by message name
    offers: dict[str, Offer] = field(default_factory=dict)
    ledger: str = ""  # id of its ledger, as it said on this link
    # round in which it holds our message -> its signature
    promised: dict[int, bytes] = field(default_factory=dict)
    # its messages that are refused -> why
    implausible: dict[str, str] = field(default_factory=dict)
    incoming: Offer | None = None  # the message that is being fetched on this link
    partial: Path = Path()  # the file to which it is written
    began: int = 0  # bytes of ``incoming`` that were here before this link
    stored_at: float = float("-inf")  # loop time of the last chunk of ``incoming``
    queue: deque[Frame] = field(default_factory=deque)  # frames to be sent on this link
    outgoing: tuple[str, int] | None = None  # our message that it wants, and from which byte on
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    # set when the wire has taken all queued frames
    all_said: asyncio.Event = field(default_factory=asyncio.Event)

    def linked(self, link: Link) -> None:
        """Take a new link. What the last link did not finish starts again from what is on disk."""
        self.link, self.round, self.refused, self.disbelieved = link, None, None, False
        self.queue, self.outgoing, self.incoming = deque(), None, None
        self.all_said.set()
        self.offers.clear()
        self.promised.clear()

    def say(self, frame: Frame) -> None:
        """Queue a frame. Without a link the frame is lost; important frames are sent again on the
        next link.
        """
        # a neighbour that asks again and again must not fill the memory
        if self.link is not None and frame not in self.queue:
            self.queue.append(frame)
            self.wake.set()
            self.all_said.clear()

    async def write(
        self, link: Link, ledger: Ledger, round: Callable[[], int], beat_s: float
    ) -> None:
        """Send the queued frames, then the wanted message chunk by chunk.

        If there is neither, send the number of the present round every ``beat_s`` seconds.
        """
        queue = self.queue  # the queue of this link; the next link gets a new one
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
        """Ask for an offered message, from the first byte that is not here yet."""
        if self.incoming == offer:
            return
        self.incoming = offer
        self.partial = partial = ledger.partial(self.name, offer.name, offer.sha256)
        have = partial.stat().st_size if partial.exists() else 0
        if have == offer.num_bytes:  # all bytes are here, but an earlier check did not end
            have = 0
            partial.unlink()
        self.began = have
        self.say(Want(offer.name, have))

    def store(
        self, chunk: Chunk, ledger: Ledger, check: Callable[[str, str, Path], object]
    ) -> bool:
        """Append a chunk to the message that is being fetched, and check the message once it is
        whole.

        Returns whether a message has arrived. Raises Misbehaviour for what no correct peer sends,
        Implausible for a message that ``check`` does not believe.
        """
        offer, name = self.incoming, chunk.name
        if offer is None or offer.name != name:
            return False  # an earlier request, which is not wanted any more
        partial = self.partial
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
                # bytes from an earlier link may be damaged: fetch the whole message again
                if self.began:
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
            partial.unlink()  # the neighbour may offer the correct content again
            raise Misbehaviour(f"its {name}: {error}") from error
        ledger.arrived(self.name, name, partial)
        return True
