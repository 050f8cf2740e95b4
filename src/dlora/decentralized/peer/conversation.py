"""The conversation of two neighbours over one link: what each frame does, until the link ends.

A peer offers a message when its local steps are done. The receiver asks for it, from the first byte
that it does not have yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from dlora.decentralized.peer.belief import Implausible
from dlora.decentralized.peer.edges import Edges
from dlora.decentralized.peer.messages import Messages
from dlora.decentralized.peer.messages_on_disk import round_message, round_of
from dlora.decentralized.peer.mismatch import difference
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.decentralized.peer.patience import BEATS, Patience
from dlora.errors import RunError
from dlora.events.neighbours import FINISHED, Linked, NotBelieved, Refused, Unlinked
from dlora.wire.frame import Link, Misbehaviour
from dlora.wire.peer.frames import Chunk, Decided, Frame, Have, Hello, Offer, Shown, Status, Want

BROKE = "the link broke"


class Conversation:
    """Talks with a neighbour until the link ends; call it with the neighbour's name and the link.

    ``failed`` ends with the error if this peer's own disk or folder fails.
    """

    def __init__(
        self,
        edges: Edges,
        manifest: str,
        manifest_hash: str,
        patience: Patience,
        messages: Messages,
        check: Callable[[str, str, Path], object],
    ) -> None:
        self.edges, self.manifest, self.manifest_hash = edges, manifest, manifest_hash
        self.patience, self.messages, self.check = patience, messages, check
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __call__(self, name: str, link: Link) -> None:
        """Talk with the neighbour ``name`` over one link until it ends."""
        edges, other = self.edges, self.edges.neighbours[name]
        await link.send(
            Hello(
                self.manifest_hash,
                self.manifest,
                edges.round,
                edges.ledger.id,
                edges.ledger.known(name),
                edges.since,
            )
        )
        try:
            async with asyncio.timeout(self.patience.silence_s):
                hello = await link.receive()
        except TimeoutError:
            return
        if not isinstance(hello, Hello):
            self._unlinked(name, f"refused: it began with {type(hello).__name__} instead of Hello")
            return
        if hello.manifest_hash != self.manifest_hash:
            self._refuse(other, difference(edges.name, self.manifest, name, hello.manifest))
            with contextlib.suppress(TimeoutError):  # the other end may not have read our Hello yet
                async with asyncio.timeout(self.patience.silence_s):
                    await link.receive()
            return
        if (abandoned := edges.words.abandoned(name, hello)) is not None:
            await link.send(abandoned)
            self._unlinked(
                name, "refused: it uses a folder again that it had given up for another one"
            )
            return
        other.linked(link)
        other.ledger = hello.ledger
        edges.report(Linked(event="linked", neighbour=name, round=hello.round))
        for shown in edges.words.lacking(name, hello):
            other.say(shown)
        for round in edges.ledger.in_doubt(name):
            other.say(Have(round, edges.words.ours(name, round)))
        newest = edges.ledger.newest_round_sent()
        if newest is not None:
            edges.offer(other, round_message(newest))
        for message in ("sum", "average"):
            if edges.ledger.own(message):
                edges.offer(other, message)
        # Status must come after the promises, because the other end would leave those edges out,
        # and after the offers.
        other.say(Status(edges.round))
        writer = asyncio.ensure_future(
            other.write(link, edges.ledger, lambda: edges.round, self.patience.silence_s / BEATS)
        )
        reason = BROKE
        try:
            edges.waits.heard(other)
            while True:
                async with asyncio.timeout(self.patience.silence_s):
                    frame = await link.receive()
                self._hear(other, frame)
                edges.waits.heard(other)
        except TimeoutError:
            reason = f"nothing came for {self.patience.silence_s:g} s"
        except Misbehaviour as error:
            reason = f"refused: {error}"
        # this peer's own folder has failed: no neighbour is the cause, and the peer must stop
        except (RunError, OSError) as error:
            reason = "this peer's folder cannot be gone on with"
            if not self.failed.done():
                where = getattr(error, "filename", None) or edges.ledger.folder
                told = (
                    f"{where} cannot be used ({getattr(error, 'strerror', None) or error}); fix"
                    " that, then add --resume"
                )
                self.failed.set_exception(error if isinstance(error, RunError) else RunError(told))
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            if other.link is link:
                other.link = None
                other.all_said.set()
                if reason == BROKE and self._has_finished(other):
                    reason = FINISHED
            self._unlinked(name, reason)
            edges.waits.pulse()

    def _has_finished(self, other: Neighbour) -> bool:
        """Whether it said that its last round and the average at the end are done."""
        round = other.round or 0
        return round > 1 and not self.messages.sizes(round_message(round - 1))

    def _unlinked(self, name: str, reason: str) -> None:
        self.edges.report(Unlinked(event="unlinked", neighbour=name, reason=reason))

    def _hear(self, other: Neighbour, frame: Frame) -> None:
        edges = self.edges
        match frame:
            case Status(round):
                other.round = round
            case Offer():
                sizes = self.messages.sizes(frame.name)
                if not sizes:
                    raise Misbehaviour(f"it offered {frame.name}, which is no message of this run")
                if frame.num_bytes not in sizes:
                    bounds = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
                    raise Misbehaviour(
                        f"it offered {frame.name} of {frame.num_bytes} bytes; that has {bounds}"
                    )
                kind = frame.name if round_of(frame.name) is None else "round"
                if kind not in other.offers or other.offers[kind].name != frame.name:
                    other.offers[kind] = frame
                edges.consider(other)
            case Want(name, offset):
                message = edges.ledger.own(name)
                if message is not None and offset < message.num_bytes:
                    other.outgoing = (name, offset)
                    other.wake.set()
            case Chunk(name):
                try:
                    arrived = other.store(frame, edges.ledger, self.check)
                except Implausible as error:
                    arrived = False
                    edges.report(
                        NotBelieved(
                            event="implausible",
                            neighbour=other.name,
                            message=name,
                            reason=str(error),
                        )
                    )
                if arrived and round_of(name) == edges.round and other.name in edges.mixing:
                    edges.promise(other, edges.round)
            case Have(round, signature):
                if not edges.decides(other.name):
                    raise Misbehaviour(f"it promised in round {round}, which is its own to decide")
                if round <= edges.round:
                    other.promised[round] = signature
                    edges.decide(other, round)
            case Decided():
                edges.decided(other, frame)
            case Shown():
                edges.shown(other, frame)
            case Hello():
                raise Misbehaviour("it said Hello twice")

    def _refuse(self, other: Neighbour, reason: str) -> None:
        if other.refused != reason:
            other.refused = reason
            self.edges.report(Refused(event="refused", neighbour=other.name, reason=reason))
        self.edges.waits.pulse()
