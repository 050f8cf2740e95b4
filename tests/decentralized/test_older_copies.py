"""A folder that was restored from an older copy, a ledger without its last lines, one key on two
machines: in virtual time.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from dlora.decentralized.peer.ledger import Ledger, Word
from dlora.errors import RunError
from dlora.wire.peer.frames import Decided, Frame, Have, Hello, Shown, Status
from kit import virtual_clock
from kit.older_copies import end_of, older_copy_of, rounds_of
from kit.virtual_federation import World

pytestmark = pytest.mark.usefixtures("disk_of_a_virtual_world")

ROUNDS = 8


@pytest.mark.parametrize(
    ("num_peers", "victim"), [(2, "a"), (2, "b"), (4, "a"), (4, "b"), (4, "d")]
)
def test_an_older_copy_ends_and_the_others_go_on(
    num_peers: int, victim: str, tmp_path: Path
) -> None:
    """Field case 42: with one neighbour and with two, at either end of an edge."""
    world = World(tmp_path, num_peers=num_peers, rounds=ROUNDS)
    virtual_clock.run(world.run(older_copy_of(victim)))
    ended = world.ended  # type: ignore[attr-defined]
    assert isinstance(ended, RunError) and "\n" not in str(ended)
    assert f"has {victim}'s signature for round 3, and this folder ends with round" in str(ended)
    assert (
        str(tmp_path) in str(ended)
        and "restore the newest copy" in str(ended)
        and "without --resume" in str(ended)
    )
    assert set(world.results) == set(world.names) - {victim}
    [told] = [fields for name in world.results for fields in world.story_of(name, "lacks")][:1]
    assert told["neighbour"] == victim and told["shown"] > 0
    assert not world.broken


@pytest.mark.parametrize("victim", ["a", "b"])
def test_a_folder_that_is_started_anew_is_exempt(victim: str, tmp_path: Path) -> None:
    """Field case 42: it takes its neighbours' state, and stays exempt when its links break after
    that.
    """
    world = World(tmp_path, rounds=20)
    world.catch_up_after = 2

    async def plan(world: World) -> None:
        cutting = asyncio.create_task(cut(world))
        await older_copy_of(victim, anew=True)(world)  # type: ignore[misc]
        await cutting

    async def cut(world: World) -> None:
        while not world.story_of(victim, "caught-up"):
            await asyncio.sleep(0.05)
        await asyncio.sleep(3.0)
        for other in world.neighbours(victim):
            world.hub.cut(victim, other)
        await asyncio.sleep(5.0)
        for other in world.neighbours(victim):
            world.hub.mend(victim, other)

    virtual_clock.run(world.run(plan))
    assert world.ended is None and set(world.results) == set(world.names)  # type: ignore[attr-defined]
    assert not any(world.story_of(name, "lacks") for name in world.names)
    assert len(world.story_of(victim, "linked")) > 2


@pytest.mark.parametrize("victim", ["a", "b"])
def test_lost_last_lines_are_restored_where_the_messages_are(victim: str, tmp_path: Path) -> None:
    """Field case 42: the neighbour shows this peer's signature; ledgers agree and the mean is
    kept.
    """
    world = World(tmp_path, num_peers=2, rounds=ROUNDS)

    async def plan(world: World) -> None:
        path = world.folder / victim / "edges.jsonl"
        await rounds_of(world, victim, 3)
        kept = path.read_bytes()
        commits = world.commits[victim]
        while not {(3, name) for name in world.names} & world.ledger(victim):
            await asyncio.sleep(0.01)
        while world.commits[victim][1].rounds_done < 4:
            await asyncio.sleep(0.01)
        world.kill(victim)
        await end_of(world, victim)
        path.write_bytes(kept)
        world.commits[victim] = commits
        world.begin(victim)

    virtual_clock.run(world.run(plan))
    restored = [
        fields
        for fields in world.story_of(victim, "edge")
        if "had lost the line" in fields["reason"]
    ]
    assert [fields["round"] for fields in restored] == [3]
    assert world.check_ledgers() == ROUNDS
    np.testing.assert_allclose(world.total(), sum(world.start.values()).numpy(), rtol=0, atol=1e-12)  # type: ignore[union-attr]


class Shows:
    """b shows what it likes with every Status."""

    name = "b"

    def __init__(self, make: Callable[[str], Iterable[Frame]]) -> None:
        self.make = make

    def tells(self, there: str, frame: Frame) -> Iterable[Frame]:
        return [frame, *(self.make(there) if isinstance(frame, Status) else [])]

    def answers(self, there: str, frame: Frame) -> Iterable[Frame]:
        return []


@pytest.mark.parametrize(
    "signature",
    [b"", *(pytest.param(bytes([byte] * 64), marks=pytest.mark.slow) for byte in (0, 255))],
)
def test_a_claim_without_a_signature_ends_nobody(signature: bytes, tmp_path: Path) -> None:
    """Field case 42: the liar's link ends, with its name."""
    world = World(tmp_path, rounds=4)
    ids: dict[str, str] = {}

    def note(world: World, here: str, there: str, frame: Frame) -> None:
        if isinstance(frame, Hello):
            ids[here] = frame.ledger

    world.on_frame = note
    world.liar = Shows(lambda there: [Shown(2, ids[there], "0" * 64, "1" * 64, signature)])
    virtual_clock.run(world.run())
    assert {"a", "c", "d"} <= set(world.results)
    reasons = [fields["reason"] for name in "ac" for fields in world.story_of(name, "unlinked")]
    assert any(
        "refused: it showed a signature for round 2 that this peer has not made" in reason
        for reason in reasons
    )


def test_a_replayed_promise_ends_nobody(tmp_path: Path) -> None:
    """Field case 42: a tells b that its rounds are dropped, and shows b the promise that b had
    signed in truth.
    """
    world = World(tmp_path, rounds=6)
    promises: list[Shown] = []

    class Replays:
        name = "a"

        def tells(self, there: str, frame: Frame) -> Iterable[Frame]:
            told = (
                Decided(frame.round, False)
                if isinstance(frame, Decided) and there == "b"
                else frame
            )
            return [told, *(promises[:1] if isinstance(frame, Status) and there == "b" else [])]

        def answers(self, there: str, frame: Frame) -> Iterable[Frame]:
            if isinstance(frame, Have) and there == "b":
                ledgers = [Ledger(world.folder / name) for name in "ab"]
                sums = ledgers[1].sums(frame.round, "a")
                for ledger in ledgers:
                    ledger.close()
                assert sums is not None
                promises.append(
                    Shown(frame.round, ledgers[1].id, sums[1], sums[0], frame.signature)
                )
            return []

    world.liar = Replays()
    virtual_clock.run(world.run())
    assert promises and {"b", "c", "d"} <= set(world.results)
    assert not any("refused" in fields["reason"] for fields in world.story_of("b", "unlinked"))


def test_one_folder_on_two_machines_ends_the_one_behind(tmp_path: Path) -> None:
    """Field case 42: a copy of b's folder goes on elsewhere with b's key; b comes back from where
    it stood.
    """
    world = World(tmp_path, num_peers=2, rounds=ROUNDS, rate=0.1)

    async def plan(world: World) -> None:
        await rounds_of(world, "b", 2)
        world.kill("b")
        await end_of(world, "b")
        here, commit = (
            shutil.copytree(world.folder / "b", world.folder / "copy"),
            world.commits["b"],
        )
        world.begin("b")  # the other machine
        await rounds_of(world, "b", 4)
        world.kill("b")
        await end_of(world, "b")
        shutil.rmtree(world.folder / "b")
        shutil.copytree(here, world.folder / "b")
        world.commits["b"] = commit
        world.begin("b")
        assert isinstance(await end_of(world, "b"), RunError)
        world.tasks.pop("b")

    virtual_clock.run(world.run(plan))
    assert set(world.results) == {"a"}


def test_a_folder_that_was_given_up_for_another_gets_no_link(tmp_path: Path) -> None:
    """Field case 42: b was started anew, and comes back with its first folder: it is told so, and a
    mixes nothing with it.
    """
    world = World(tmp_path, num_peers=2, rounds=30)
    world.catch_up_after = 2

    async def plan(world: World) -> None:
        place = world.folder / "b"
        await rounds_of(world, "b", 3)
        world.kill("b")
        await end_of(world, "b")
        first, commit = place.rename(world.folder / "first"), world.commits.pop("b")
        world.begin("b")
        id = (first / "id").read_text().partition("\n")[0]
        while len([word for word in words_of(world) if word.ledger != id]) < 2:
            await asyncio.sleep(0.05)
        world.kill("b")
        await end_of(world, "b")
        shutil.rmtree(place)
        first.rename(place)
        world.commits["b"] = commit
        world.begin("b")

    def words_of(world: World) -> list[Word]:
        ledger = Ledger(world.folder / "a")
        ledger.close()
        return ledger.words("b")

    virtual_clock.run(world.run(plan))
    assert any(
        "refused: it uses a folder again" in fields["reason"]
        for fields in world.story_of("a", "unlinked")
    )
    assert any(
        "signature for round" in fields["reason"] for fields in world.story_of("b", "two-folders")
    )
