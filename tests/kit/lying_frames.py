"""Members that lie, as processes: `dlora` with frames of their own in between."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from dlora.decentralized.peer.exchange import Exchange
from dlora.decentralized.peer.messages_on_disk import round_message
from dlora.wire.frame import Link
from dlora.wire.peer.frames import Chunk, Frame, Offer, Status, Want
from kit import processes


class Altered:
    """A link on which the ``lie`` (exchange, neighbour, frame sent) says what goes out, and
    contents may be others.
    """

    def __init__(self, exchange: Exchange, neighbour: str, link: Link, lie: Lie) -> None:
        self.exchange, self.neighbour, self.link, self.lie = exchange, neighbour, link, lie

    async def send(self, frame: Frame) -> None:
        for told in self.lie(self.exchange, self.neighbour, frame):
            await self.link.send(told)

    async def receive(self) -> Frame:
        frame: Frame = await self.link.receive()
        content = CONTENTS.get((self.neighbour, frame.name)) if isinstance(frame, Want) else None
        if (
            isinstance(frame, Want)
            and content is not None
            and self.exchange.ledger.own(frame.name) is None
        ):
            for start in range(frame.offset, len(content), 1 << 18):
                await self.link.send(Chunk(frame.name, start, content[start : start + (1 << 18)]))
        return frame


Lie = Callable[[Exchange, str, Frame], Iterator[Frame]]
CONTENTS: dict[tuple[str, str], bytes] = {}  # (neighbour, message): what it is told


def offer(neighbour: str, name: str) -> Offer:
    content = CONTENTS[neighbour, name]
    return Offer(name, len(content), hashlib.sha256(content).hexdigest())


def times(content: bytes, factor: float) -> bytes:
    return save(
        {
            name: tensor if name == "num_peers" else factor * tensor
            for name, tensor in load(content).items()
        }
    )


def claims_the_last_round(exchange: Exchange, neighbour: str, frame: Frame) -> Iterator[Frame]:
    """It is far ahead, it says, with a state of its own; what it owes it sends as everybody does.

    It says so at the beginning of each round, and once behind what it owes, of `FOLLOWED`: no
    other offer takes the claim's place before the neighbour looks, however fast that one is.
    """
    yield frame
    newest = exchange.ledger.newest_round_sent()
    if newest is None:
        return
    begins = isinstance(frame, Status) and frame.round < LAST_ROUND
    if begins or isinstance(frame, Offer) and frame.name == round_message(FOLLOWED):
        name, own = round_message(LAST_ROUND), exchange.ledger.own(round_message(newest))
        assert own is not None
        CONTENTS.setdefault((neighbour, name), times(own.path.read_bytes(), 1.5))
        yield offer(neighbour, name)


def turns_the_average_round(exchange: Exchange, neighbour: str, frame: Frame) -> Iterator[Frame]:
    """It sends -average and keeps the true one."""
    own = exchange.ledger.own("average")
    if own is None or not isinstance(frame, Offer | Chunk) or frame.name != "average":
        yield frame
        return
    content = CONTENTS.setdefault((neighbour, "average"), times(own.path.read_bytes(), -1.0))
    if isinstance(frame, Offer):
        yield offer(neighbour, "average")
    else:
        yield Chunk("average", frame.offset, content[frame.offset :][: len(frame.data)])


LAST_ROUND = 0
FOLLOWED = 1
LIES: dict[str, Lie] = {
    lie.__name__: lie for lie in (claims_the_last_round, turns_the_average_round)
}


def dlora_with(lie: str, rounds: int) -> Callable[[Sequence[str], Path, Path], None]:
    """What a lying member runs instead of `dlora`."""
    return _Program(lie, rounds)


class _Program:
    """A function that can be handed to another process."""

    def __init__(self, lie: str, rounds: int) -> None:
        self.lie, self.rounds = lie, rounds

    def __call__(self, arguments: Sequence[str], out: Path, err: Path) -> None:
        global LAST_ROUND
        LAST_ROUND = self.rounds - 1
        talk: Any = Exchange.talk

        async def lying(exchange: Exchange, name: str, link: Link) -> None:
            await talk(exchange, name, Altered(exchange, name, link, LIES[self.lie]))

        Exchange.talk = lying  # type: ignore[method-assign, assignment]
        with contextlib.suppress(SystemExit):
            processes.run_dlora(arguments, out, err)
