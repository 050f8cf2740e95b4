"""Transfers that break, in virtual time, and messages that come late or after the end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.neighbour import Neighbour
from dlora.wire.peer.frames import Chunk, Frame, Offer, Want
from dlora.wire.tensors import message_num_bytes
from kit import virtual_clock
from kit.virtual_federation import PATIENCE, World, expected

pytestmark = pytest.mark.usefixtures("disk_of_a_virtual_world")


def test_an_interrupted_transfer_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link breaks after some chunks, and again after some more; no byte that was stored is sent
    twice.
    """
    monkeypatch.setattr("dlora.decentralized.peer.neighbour.MAX_CHUNK_BYTES", 16)
    world = World(tmp_path, num_peers=2, rounds=1)
    sent: list[Chunk] = []
    wanted: list[Want] = []

    def note(world: World, here: str, there: str, frame: Frame) -> None:
        if isinstance(frame, Want) and here == "b" and frame.name == "round-000000":
            wanted.append(frame)
        if isinstance(frame, Chunk) and here == "a" and frame.name == "round-000000":
            sent.append(frame)
            if len(sent) in (3, 5):
                world.hub.cut("a", "b")
                asyncio.get_running_loop().call_later(5.0, world.hub.mend, "a", "b")

    world.on_frame = note
    virtual_clock.run(world.run())
    assert world.check_ledgers() == 1
    assert len(wanted) == 3 and 0 == wanted[0].offset < wanted[1].offset < wanted[2].offset
    lost = 2  # the chunks that were under way when a link broke
    assert len(sent) <= -(-message_num_bytes(expected("round-000000")) // 16) + lost


def test_the_rest_of_another_content_is_not_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two links the sender lost its disk and offers the same name anew: the hash differs,
    so it begins at 0.
    """
    ledger = Ledger(tmp_path)
    ledger.partial("a", "sum", "1" * 64).write_bytes(b"half of what was")
    neighbour = Neighbour("a")
    neighbour.say = lambda frame: said.append(frame)  # type: ignore[method-assign]
    said: list[Frame] = []
    neighbour.fetch(Offer("sum", 100, "2" * 64), ledger)
    neighbour.incoming = None
    neighbour.fetch(Offer("sum", 100, "2" * 64), ledger)
    assert said == [Want("sum", 0), Want("sum", 0)]
    ledger.partial("a", "sum", "2" * 64).write_bytes(b"12345")
    neighbour.incoming = None
    neighbour.fetch(Offer("sum", 100, "2" * 64), ledger)
    assert said[-1] == Want("sum", 5)
    ledger.close()


def test_who_was_missing_at_the_end_is_in_the_average_once_all_resume(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.fault = lambda name, what: (
        (name, what) == ("a", "commit") and world.rounds_now.get("a") == 2
    )

    async def plan(world: World) -> None:
        while not all(world.tasks[name].done() for name in "bcd"):
            await asyncio.sleep(1.0)

    virtual_clock.run(world.run(plan))
    assert {name: num_peers for name, (_, num_peers) in world.results.items()} == {
        "b": 2,
        "c": 2,
        "d": 1,
    }
    world.fault = lambda name, what: False
    virtual_clock.run(world.run())
    mean = sum(world.start.values()).numpy() / 4  # type: ignore[union-attr]
    for consensus, num_peers in world.results.values():
        assert num_peers == 4
        np.testing.assert_allclose(consensus.numpy(), mean, rtol=0, atol=1e-12)


def test_a_broken_link_while_catching_up_holds_nobody_up(tmp_path: Path) -> None:
    """The message it wanted is not offered any more after the break: it takes the next, and nobody
    waits for the limit.
    """
    world = World(tmp_path, rounds=60, rate=0.1)
    world.catch_up_after = 5
    broken: list[bool] = []

    def cut(world: World, here: str, there: str, frame: Frame) -> None:
        if (
            (here, there, type(frame)) == ("a", "b", Chunk)
            and world.story_of("b", "linked")[2:]
            and not broken
        ):
            broken.append(True)
            world.hub.cut("a", "b")
            asyncio.get_running_loop().call_later(10.0, world.hub.mend, "a", "b")

    world.on_frame = cut

    async def plan(world: World) -> None:
        await asyncio.sleep(2.0)
        world.kill("b")
        await asyncio.sleep(PATIENCE.silence_s + 20)
        world.begin("b")

    virtual_clock.run(world.run(plan))
    assert broken and world.story_of("b", "caught-up")
    world.check_ledgers()
    assert max(time for time, *_ in world.story) < PATIENCE.round_limit_s


def test_killed_when_it_already_had_the_average(tmp_path: Path) -> None:
    """The others have ended; what is on its disk is all there is, and all there needs to be."""
    world = World(tmp_path)
    commits: list[str] = []

    def fault(name: str, what: str) -> bool:
        if (name, what) == ("d", "commit"):
            commits.append(what)
        # the one after the reduction
        return len(commits) == world.rounds + 2 and (name, what) == ("d", "commit")

    world.fault = fault

    async def plan(world: World) -> None:
        while not all(task.done() for task in world.tasks.values()):
            await asyncio.sleep(1.0)
        assert "d" not in world.results
        world.begin("d")

    virtual_clock.run(world.run(plan))
    consensus, num_peers = world.results["d"]
    assert num_peers == 4 and consensus.equal(world.results["a"][0])
