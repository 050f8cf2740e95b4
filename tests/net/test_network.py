"""The contract of a wire, kept by real TLS on loopback and by the wire in memory alike."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

import pytest

from dlora.errors import ConfigError
from dlora.net.memory import MemoryHub
from dlora.net.transport import LinkDown, Network, Traffic
from dlora.wire.frame import Link
from dlora.wire.peer.codec import PEERS, encode_frame
from dlora.wire.peer.frames import (
    MAX_CHUNK_BYTES,
    Chunk,
    Decided,
    Frame,
    Have,
    Hello,
    Offer,
    Status,
    Want,
)
from kit.loopback import Loopback, run, running

FRAMES: list[Frame] = [
    Hello("a" * 64, '{"seed": 1}', 0, "b" * 64),
    Status(3),
    Offer("round-000003", 12, "b" * 64),
    Want("round-000003", 4),
    Chunk("round-000003", 4, bytes(MAX_CHUNK_BYTES)),
    Have(3),
    Decided(3, True),
    Decided(4, False),
]


class Pair(Protocol):
    """The networks of a and b, linked by any means; each is served with the talk given."""

    def serve(self, name: str, talk: Any) -> contextlib.AbstractAsyncContextManager[Network]: ...


class InMemory:
    def __init__(self, folder: Path) -> None:
        self.hub = MemoryHub({"a": ["b"], "b": ["a"]}, PEERS, redial_s=0.01)

    @contextlib.asynccontextmanager
    async def serve(self, name: str, talk: Any) -> AsyncIterator[Network]:
        network = self.hub.network(name)
        async with running(network.serve(talk)):
            yield network


@pytest.fixture(params=[InMemory, Loopback], ids=["memory", "grpc"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    made: Pair = request.param(tmp_path)
    return made


@pytest.fixture(params=["ab", "a", "b"], ids=["both listen", "a listens", "b listens"])
def grpc_pair(request: pytest.FixtureRequest, tmp_path: Path) -> Loopback:
    return Loopback(tmp_path, request.param)


@pytest.fixture(autouse=True)
def quick_redial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlora.net.options.MAX_PAUSE_S", 0.05)
    monkeypatch.setattr("dlora.net.options.MIN_PAUSE_S", 0.01)


async def take(link: Link, num_frames: int) -> list[Frame]:
    return [await link.receive() for _ in range(num_frames)]


async def until_down(link: Link) -> None:
    with pytest.raises(LinkDown):
        while True:
            await link.receive()
    with pytest.raises(LinkDown):
        while True:
            await link.send(Status(0))
            await asyncio.sleep(0)


Talks = Callable[[str, Link], Coroutine[Any, Any, None]]


def scripted(*parts: Talks) -> tuple[Talks, asyncio.Event]:
    """A talk that plays one part on each new link, and the event of the last part's end; later
    links end at once.
    """
    left, done = list(parts), asyncio.Event()

    async def talk(name: str, link: Link) -> None:
        if left:
            part = left.pop(0)
            await part(name, link)
            if not left:
                done.set()

    return talk, done


async def both(pair: Pair, at_a: Talks, at_b: Talks) -> tuple[Traffic, Traffic]:
    """Serve both ends, one link; returns when both conversations have returned."""
    talk_a, done_a = scripted(at_a)
    talk_b, done_b = scripted(at_b)
    async with pair.serve("a", talk_a) as a, pair.serve("b", talk_b) as b:
        await done_a.wait()
        await done_b.wait()
        return a.traffic, b.traffic


def test_frames_arrive_whole_once_and_in_order_both_ways(pair: Pair) -> None:
    got: dict[str, list[Frame]] = {}
    ends: dict[str, str] = {}
    met = asyncio.Barrier(2)

    async def talk(other: str, link: Link) -> None:
        ends["a" if other == "b" else "b"] = other

        async def say() -> None:
            for frame in FRAMES * 3:
                await link.send(frame)

        _, got[other] = await asyncio.gather(say(), take(link, 3 * len(FRAMES)))
        await met.wait()

    run(nothing(both(pair, talk, talk)))
    assert got == {"a": FRAMES * 3, "b": FRAMES * 3}
    assert ends == {"a": "b", "b": "a"}


async def nothing(coroutine: Coroutine[Any, Any, Any]) -> None:
    await coroutine


def test_both_ends_count_the_same_bytes(pair: Pair) -> None:
    async def main() -> None:
        met = asyncio.Barrier(2)

        async def at_a(_: str, link: Link) -> None:
            for frame in FRAMES:
                await link.send(frame)
            await take(link, 2)
            await met.wait()

        async def at_b(_: str, link: Link) -> None:
            await take(link, len(FRAMES))
            for frame in FRAMES[:2]:
                await link.send(frame)
            await met.wait()

        a, b = await both(pair, at_a, at_b)
        assert a.sent_bytes == {"b": sum(len(encode_frame(frame)) for frame in FRAMES)}
        assert b.sent_bytes == {"a": sum(len(encode_frame(frame)) for frame in FRAMES[:2])}
        assert b.received_bytes == {"a": a.sent_bytes["b"]}
        assert a.received_bytes == {"b": b.sent_bytes["a"]}

    run(main())


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_conversation_that_returns_ends_the_link_at_both_ends(pair: Pair, first: str) -> None:
    async def main() -> None:
        async def leaves(_: str, link: Link) -> None:
            await link.send(Status(1))
            await link.receive()

        async def stays(_: str, link: Link) -> None:
            await link.send(Status(2))
            assert await link.receive() == Status(1)
            await until_down(link)

        await both(pair, *((leaves, stays) if first == "a" else (stays, leaves)))

    run(main())


def test_a_conversation_that_fails_ends_its_link_only(pair: Pair) -> None:
    async def main() -> None:
        async def fails(_: str, link: Link) -> None:
            await link.receive()
            raise ZeroDivisionError

        async def good(_: str, link: Link) -> None:
            assert await link.receive() == Status(0)

        async def stays(_: str, link: Link) -> None:
            await link.send(Status(0))
            await until_down(link)

        talk_a, done_a = scripted(fails, good)
        talk_b, done_b = scripted(stays, stays)
        async with pair.serve("a", talk_a), pair.serve("b", talk_b):
            await done_a.wait()
            await done_b.wait()

    run(main())


def test_a_participant_that_goes_and_comes_back_gets_a_new_link(pair: Pair) -> None:
    async def main() -> None:
        linked, back = asyncio.Event(), asyncio.Event()

        async def before(_: str, link: Link) -> None:
            assert await link.receive() == Status(1)
            linked.set()
            await until_down(link)

        async def after(_: str, link: Link) -> None:
            assert await link.receive() == Status(2)
            back.set()

        def saying(round: int) -> Talks:
            async def say(_: str, link: Link) -> None:
                await link.send(Status(round))
                with contextlib.suppress(LinkDown):
                    await link.receive()

            return say

        talk, _ = scripted(before, after)
        async with pair.serve("a", talk):
            async with pair.serve("b", saying(1)):
                await linked.wait()
            async with pair.serve("b", saying(2)):
                await back.wait()

    run(main())


def test_a_receive_that_is_given_up_loses_no_frame(pair: Pair) -> None:
    async def main() -> None:
        given_up, met = asyncio.Event(), asyncio.Barrier(2)

        async def at_a(_: str, link: Link) -> None:
            for _attempt in range(3):
                receiving = asyncio.ensure_future(link.receive())
                await asyncio.sleep(0)
                receiving.cancel()
            given_up.set()
            assert await take(link, 2) == [Status(1), Status(2)]
            await met.wait()

        async def at_b(_: str, link: Link) -> None:
            await given_up.wait()
            await link.send(Status(1))
            await link.send(Status(2))
            await met.wait()

        await both(pair, at_a, at_b)

    run(main())


NUM_CHUNKS = (64 << 20) // MAX_CHUNK_BYTES


def test_sending_waits_for_an_end_that_does_not_read(pair: Pair) -> None:
    """And what lies between the two is bounded, whatever is said."""

    async def main() -> None:
        stuck, met = asyncio.Event(), asyncio.Barrier(2)
        sent = 0

        async def writes(_: str, link: Link) -> None:
            nonlocal sent
            await link.send(Status(0))
            for offset in range(NUM_CHUNKS):
                sending = asyncio.ensure_future(
                    link.send(Chunk("x", offset, bytes(MAX_CHUNK_BYTES)))
                )
                done, _pending = await asyncio.wait({sending}, timeout=0.5)
                if not done:
                    stuck.set()
                await sending
                sent += not stuck.is_set()
            await met.wait()

        async def reads(_: str, link: Link) -> None:
            await link.receive()
            await stuck.wait()
            got = await take(link, NUM_CHUNKS)
            assert [frame.offset for frame in got if isinstance(frame, Chunk)] == list(
                range(NUM_CHUNKS)
            )
            await met.wait()

        await both(pair, writes, reads)
        assert sent * MAX_CHUNK_BYTES <= 16 << 20

    run(main())


# What only a wire with an outside has


def test_the_last_frames_of_a_network_that_ends_arrive(grpc_pair: Loopback) -> None:
    """The other end has not read them yet when their sender's network is cancelled."""
    got: list[Frame] = []

    async def ends() -> None:
        said, over = asyncio.Event(), asyncio.Event()

        async def say(name: str, link: Link) -> None:
            await link.receive()
            for number in range(1, 6):
                await link.send(Status(number))
            said.set()
            await asyncio.Event().wait()

        async def hear(name: str, link: Link) -> None:
            await link.send(Status(0))
            await said.wait()
            await asyncio.sleep(0.1)  # the sender's network ends meanwhile
            with contextlib.suppress(LinkDown):
                while True:
                    got.append(await link.receive())
            over.set()

        async with grpc_pair.serve("b", hear):
            async with grpc_pair.serve("a", say):
                await said.wait()
            await over.wait()

    run(ends())
    assert got == [Status(number) for number in range(1, 6)]


def test_either_end_can_open_the_link(grpc_pair: Loopback) -> None:
    async def main() -> None:
        met = asyncio.Barrier(2)

        async def talk(_: str, link: Link) -> None:
            await link.send(Status(5))
            assert await link.receive() == Status(5)
            await met.wait()

        await both(grpc_pair, talk, talk)

    run(main())
    assert grpc_pair.refused == []


def test_of_two_simultaneous_links_one_stays(tmp_path: Path) -> None:
    """Both dial; there is one conversation, and its link carries frames both ways."""

    async def main() -> None:
        pair = Loopback(tmp_path)
        links = {"a": 0, "b": 0}
        heard = {"a": asyncio.Event(), "b": asyncio.Event()}

        async def talk(other: str, link: Link) -> None:
            links[other] += 1
            await link.send(Status(0))
            for _ in range(50):
                await link.receive()
                await link.send(Status(0))
            heard[other].set()
            await until_down(link)

        a, b = pair.network("a"), pair.network("b")
        async with running(a.serve(talk)), running(b.serve(talk)):
            await a.bound.wait()
            await b.bound.wait()
            pair.address("a", f"127.0.0.1:{a.port}")
            pair.address("b", f"127.0.0.1:{b.port}")
            await heard["a"].wait()
            await heard["b"].wait()
            assert links == {"a": 1, "b": 1}
        assert pair.refused == []

    run(main())


def test_an_address_in_use_is_one_line(tmp_path: Path) -> None:
    async def main() -> None:
        pair = Loopback(tmp_path)
        talk, _ = scripted()
        async with pair.serve("a", talk) as a:
            with pytest.raises(
                ConfigError, match=f"cannot listen on 127.0.0.1:{a.port}: another program does"
            ):
                await pair.network("b", listen=f"127.0.0.1:{a.port}").serve(talk)

    run(main())
