"""A member that breaks the rules: its link ends, nothing of it is mixed, and the peer goes on with
the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import torch

from dlora.decentralized.peer.mismatch import difference
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.wire.frame import Link
from dlora.wire.peer.frames import Chunk, Decided, Frame, Have, Hello, Offer, Status, Want
from dlora.wire.tensors import encode, message_num_bytes
from kit import virtual_clock
from kit.virtual_federation import PATIENCE, SIZE, World, expected

pytestmark = pytest.mark.usefixtures("disk_of_a_virtual_world")

ROUND_0 = "round-000000"
NUM_BYTES = message_num_bytes(expected(ROUND_0))


def message(values: torch.Tensor | None = None, dtype: torch.dtype = torch.float64) -> bytes:
    return encode({"x": torch.ones(SIZE) if values is None else values}, dtype)


def offered(content: bytes, name: str = ROUND_0) -> Offer:
    return Offer(name, len(content), hashlib.sha256(content).hexdigest())


async def until(link: Link, kind: type[Frame]) -> Frame:
    while not isinstance(frame := await link.receive(), kind):
        pass
    return frame


async def offers_an_alias(link: Link) -> None:
    await link.send(Offer("round-0000000", NUM_BYTES, "0" * 64))


async def offers_a_round_beyond_the_run(link: Link) -> None:
    await link.send(Offer("round-900000", NUM_BYTES, "0" * 64))


async def sends_oversized(link: Link) -> None:
    await link.send(Offer(ROUND_0, 2**40, "0" * 64))


async def offers_an_unknown_message(link: Link) -> None:
    await link.send(Offer("weights", NUM_BYTES, "0" * 64))


def sends(content: bytes, sha256: str | None = None) -> Callable[[Link], Awaitable[None]]:
    async def send(link: Link) -> None:
        offer = offered(content)
        await link.send(Offer(offer.name, offer.num_bytes, sha256 or offer.sha256))
        await until(link, Want)
        await link.send(Chunk(ROUND_0, 0, content))

    return send


async def sends_from_elsewhere(link: Link) -> None:
    await link.send(offered(message()))
    await until(link, Want)
    await link.send(Chunk(ROUND_0, 8, message()[8:]))


async def sends_more_than_offered(link: Link) -> None:
    await link.send(offered(message()))
    await until(link, Want)
    await link.send(Chunk(ROUND_0, 0, message() + b"0"))


async def decides_for_the_other(link: Link) -> None:
    await link.send(Decided(0, True))


async def says_hello_twice(link: Link) -> None:
    await link.send(Hello("0" * 64, "{}", 0, "0" * 64))


NOT_FINITE = [message(torch.full((SIZE,), value)) for value in (math.nan, math.inf)]
OTHER_SHAPE = message(torch.ones(SIZE + 1))
REFUSED = {
    "oversized": (sends_oversized, "1099511627776 bytes"),
    "another spelling of a round": (offers_an_alias, "no message of this run"),
    "a round beyond the run": (offers_a_round_beyond_the_run, "no message of this run"),
    "unknown message": (offers_an_unknown_message, "no message of this run"),
    "another content than offered": (
        sends(message(), "0" * 64),
        "not the content that was offered",
    ),
    "not a number": (sends(NOT_FINITE[0]), "not finite"),
    "infinity": (sends(NOT_FINITE[1]), "not finite"),
    "a pickle": (sends(b"\x80\x04".ljust(NUM_BYTES, b".")), "header"),
    "a wrong shape": (sends(OTHER_SHAPE), f"of {len(OTHER_SHAPE)} bytes"),
    "a wrong dtype": (sends(message(dtype=torch.float32)), "bytes"),
    "from elsewhere": (sends_from_elsewhere, "from 8 of"),
    "more than offered": (sends_more_than_offered, "from 0 of"),
    "the other's decision": (decides_for_the_other, "not its to decide"),
    "a second hello": (says_hello_twice, "Hello twice"),
}


async def hostile(
    world: World, does: Callable[[Link], Awaitable[None]], hello: bool = True
) -> None:
    """Peer b is a member with a right identity and a program of its own; it does so once to each
    neighbour, then is silent.
    """
    run = world.manifests["b"].encode().hex().ljust(64, "0")[:64]

    async def talk(neighbour: str, link: Link) -> None:
        if hello:
            await link.send(Hello(run, world.manifests["b"], 0, "b" * 64))
            await link.receive()
            await link.send(Status(0))
        await does(link)
        await asyncio.sleep(2 * PATIENCE.silence_s)  # says no more, and does not dial again at once

    await world.hub.network("b").serve(talk)


async def forever(link: Link) -> AsyncIterator[Frame]:
    while True:
        yield await link.receive()


def run_with(
    world: World, does: Callable[[Link], Awaitable[None]], hello: bool = True
) -> list[str]:
    """All but b live their run beside the hostile b; returns why a ended b's links."""

    async def plan(world: World) -> None:
        attack = asyncio.create_task(hostile(world, does, hello))
        while not world.tasks["a"].done():
            await asyncio.sleep(1.0)
        attack.cancel()
        await asyncio.gather(attack, return_exceptions=True)

    virtual_clock.run(world.run(plan, without="b"))
    assert set(world.results) == {"a", "c", "d"}
    assert not any(other == "b" for name in "ac" for _, other in world.ledger(name)), (
        "an edge with b was mixed"
    )
    for name in "acd":
        assert world.commits[name][0].isfinite().all()
    assert {round for round, other in world.ledger("d") if other == "a"} == set(
        range(world.rounds)
    ), "a went on with d"
    return [
        fields["reason"]
        for _, name, event, fields in world.story
        if (name, event) == ("a", "unlinked")
    ]


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tmp_path: Path, what: str) -> None:
    does, said = REFUSED[what]
    reasons = run_with(World(tmp_path), does)
    assert any(reason.startswith("refused: ") and said in reason for reason in reasons), reasons


def test_the_first_frame_is_no_hello(tmp_path: Path) -> None:
    reasons = run_with(World(tmp_path), lambda link: link.send(Have(0)), hello=False)
    assert "refused: it began with Have instead of Hello" in reasons


@pytest.mark.parametrize(
    "frame",
    [
        Have(7),
        Decided(7, True),
        Offer("round-000007", NUM_BYTES, "0" * 64),
        Want("round-000007", 0),
    ],
)
def test_frames_of_another_round_change_nothing(tmp_path: Path, frame: Frame) -> None:
    """A promise for what is to come, a decision nobody asked for, an offer of a round that is not:
    none is acted on.
    """

    async def does(link: Link) -> None:
        await link.send(frame)

    run_with(World(tmp_path), does)


def test_an_old_round_is_not_taken_again(tmp_path: Path) -> None:
    """b sends a right message of round 0, and offers it again, changed, in every later round:
    nobody asks for it.
    """
    world = World(tmp_path)
    wanted: list[Frame] = []

    async def replays(link: Link) -> None:
        async for frame in forever(link):
            if isinstance(frame, Status) and frame.round > 0:
                await link.send(offered(message(torch.full((SIZE,), 9.0))))
            elif isinstance(frame, Want):
                wanted.append(frame)

    run_with(world, replays)
    assert not wanted


def test_a_silent_member_holds_nothing_up_for_longer_than_the_bound(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def nothing(link: Link) -> None:
        pass

    reasons = run_with(world, nothing)
    assert f"nothing came for {PATIENCE.silence_s:g} s" in reasons
    assert max(time for time, name, _, _ in world.story if name == "a") < 10 * PATIENCE.silence_s


def test_a_slow_drip_costs_the_edge_and_no_more_than_the_limit_a_round(tmp_path: Path) -> None:
    """One frame every 30 s is a sign of life; `round_limit_s` bounds what it can cost."""
    world = World(tmp_path)

    async def drips(link: Link) -> None:
        while True:
            await asyncio.sleep(PATIENCE.silence_s / 2)
            await link.send(Status(0))

    run_with(world, drips)
    waits = [
        fields["reason"] for _, name, event, fields in world.story if (name, event) == ("a", "edge")
    ]
    assert waits.count(f"the round has waited {PATIENCE.round_limit_s:g} s") == world.rounds


def test_one_neighbour_that_says_it_is_far_ahead_is_not_followed(tmp_path: Path) -> None:
    """Its state would replace this peer's, and the run would be over: it takes more than half of
    the neighbours.
    """
    world = World(tmp_path, rounds=30)
    content = message(torch.full((SIZE,), 9.0))

    async def pretends(link: Link) -> None:
        await link.send(offered(content, "round-000028"))
        while True:
            if isinstance(await link.receive(), Want):
                await link.send(Chunk("round-000028", 0, content))

    run_with(world, pretends)
    assert not any(world.story_of(name, "caught-up") for name in "acd")


def test_a_sum_of_more_peers_than_there_are_below_is_left_out(tmp_path: Path) -> None:
    world = World(tmp_path)
    content = encode({"x": torch.ones(SIZE), "num_peers": torch.tensor([4.0])}, torch.float64)

    async def counts_too_many(link: Link) -> None:
        async for frame in forever(link):
            if isinstance(frame, Status) and frame.round >= world.rounds:
                await link.send(Status(frame.round))
                await link.send(Offer("sum", len(content), hashlib.sha256(content).hexdigest()))
            elif isinstance(frame, Want):
                await link.send(Chunk(frame.name, 0, content))

    run_with(world, counts_too_many)
    assert [fields["neighbour"] for fields in world.story_of("a", "left-out")] == ["b"]
    assert world.results["a"][1] == 2, "a and d; c hangs below b"


def test_asking_again_and_again_fills_no_memory() -> None:
    neighbour = Neighbour("b")
    neighbour.linked(object())  # type: ignore[arg-type]  # nothing is sent here
    for _ in range(1000):
        neighbour.say(Decided(0, True))
    assert len(neighbour.queue) == 1


@pytest.mark.parametrize(
    "manifest", ["[" * 100_000, '{"\\u001b[2J": 1}', '{"' + "k" * 500_000 + '": 1}']
)
def test_what_a_stranger_run_says_of_itself_is_shown_short_and_harmless(manifest: str) -> None:
    said = difference("a", '{"r":8}', "b", manifest)
    assert len(said) < 600 and said.isprintable() and said.isascii()
