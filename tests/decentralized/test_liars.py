"""One member lies about where it is, about the average, or says nothing: what honest peers do, in
virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from dlora.decentralized.peer.life import FASTER, median
from dlora.decentralized.peer.patience import STALLS
from dlora.decentralized.peer.spread import too_far, widened
from dlora.wire.peer.frames import Chunk, Decided, Frame, Have, Offer
from kit import virtual_clock
from kit.drawn_histories import History, Lie, Stop
from kit.histories import try_history
from kit.history_liar import Member
from kit.virtual_federation import PATIENCE, SIZE, World, expected

pytestmark = pytest.mark.usefixtures("disk_of_a_virtual_world")

CLAIMS = Lie("claims", 9.0)


@pytest.mark.parametrize("topology", ["complete", "ring"])
def test_a_liar_takes_over_nobody_while_another_neighbour_is_away(
    tmp_path: Path, topology: str
) -> None:
    """All neighbours count, those that are away too: found with three peers, north jumped from
    round 21 to 199 of 200.
    """
    try_history(History(topology, 3, 12, 2, (Stop("c", 40, 700.0),), (CLAIMS,), "b"), tmp_path)


def run_beside(world: World, *lies: Lie) -> None:
    """All live their run, b as a liar."""
    world.liar = Member(world, "b", lies)

    async def plan(world: World) -> None:
        honest = [world.tasks[name] for name in world.names if name != "b"]
        await asyncio.wait(honest)
        world.tasks["b"].cancel()

    virtual_clock.run(world.run(plan))


def test_who_is_not_followed_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, num_peers=3, rounds=30)
    run_beside(world, CLAIMS)
    for name in "ac":
        assert [fields["neighbour"] for fields in world.story_of(name, "not-followed")] == ["b"]
        assert (
            "rounds ahead; by this peer's clock at most"
            in world.story_of(name, "not-followed")[0]["reason"]
        )
        assert world.trained[name] == list(range(30))


@pytest.mark.parametrize(("faster", "follows"), [(FASTER, True), (0.001, False)])
def test_a_single_neighbour_is_believed_as_far_as_the_clock_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: float, follows: bool
) -> None:
    """It is more than half of one: here it falls silent about its rounds for 600 s, of this peer's
    1.2 s each.
    """
    monkeypatch.setattr("dlora.decentralized.peer.life.FASTER", faster)
    world = World(tmp_path, num_peers=2, rounds=60)
    run_beside(world, Lie("claims", 9.0, after=30))
    assert bool(world.story_of("a", "caught-up")) == follows
    assert bool(world.story_of("a", "not-followed")) == (not follows)
    assert world.trained["a"][0] == 0 and (follows or world.trained["a"] == list(range(60)))


def test_what_is_taken_over_is_the_median() -> None:
    """One of three that lies moves nothing beyond the honest two."""
    states = [torch.tensor([1.0, 2.0]), torch.tensor([1.2, 1.8]), torch.tensor([-1e30, 1e30])]
    taken = median(states)
    assert (taken >= torch.tensor([1.0, 1.8])).all() and (taken <= torch.tensor([1.2, 2.0])).all()
    assert median(states[:2]).tolist() == torch.stack(states[:2]).mean(dim=0).tolist()


def keeps_its_average(world: World, factor: float, to: Iterable[int]) -> None:
    """The root is the liar: it sends ``factor`` times the average to those numbers and keeps the
    true one.
    """

    class Root(Member):
        def _changed(self, there: str, name: str, own: Path) -> bytes:
            return super()._changed(there, name, own) if name == "average" else own.read_bytes()

    world.liar = Root(world, "a", (Lie("scaled", factor, 0, frozenset(to)),))


def test_an_average_far_from_everything_seen_is_named(tmp_path: Path) -> None:
    """Field case 39: a root that sends -average and keeps the true one."""
    world = World(tmp_path, rounds=40, rate=0.1)
    world.start = {name: 10 + start / 10 for name, start in world.start.items()}
    world.targets = {name: 10 + target / 10 for name, target in world.targets.items()}
    keeps_its_average(world, -1.0, range(4))
    virtual_clock.run(world.run())
    for name in "bd":
        assert [fields["neighbour"] for fields in world.story_of(name, "doubtful")] == ["a"]
        assert world.results[name][1] == 4
    assert [fields["neighbour"] for fields in world.story_of("c", "doubtful")] == ["b"], (
        "it came through b"
    )


def test_two_averages_are_found_by_their_hashes(tmp_path: Path) -> None:
    """Field case 39: other averages to different neighbours; c has b's, and d another."""
    world = World(tmp_path)
    keeps_its_average(world, 1.001, [3])
    virtual_clock.run(world.run())
    found = {
        (name, fields["neighbour"])
        for name in "bcd"
        for fields in world.story_of(name, "other-content")
    }
    assert found == {("c", "d"), ("d", "c")}


@pytest.mark.parametrize("topology", ["ring", "base-k", "complete"])
def test_honest_peers_find_nothing_wrong_with_each_other(tmp_path: Path, topology: str) -> None:
    world = World(tmp_path, topology, num_peers=5, rounds=12, rate=0.1)
    virtual_clock.run(world.run())
    found = {event for _, _, event, _ in world.story}
    assert not found & {
        "doubtful",
        "implausible",
        "other-content",
        "not-followed",
        "left-out",
        "ended-without",
    }
    assert max(time for time, *_ in world.story) < 12 * 1.5, (
        "nobody waited at the end for one that had gone"
    )


class Stalled:
    """b is linked and says where it is, and delivers nothing before ``until_s``."""

    name = "b"

    def __init__(self, until_s: float) -> None:
        self.until_s = until_s

    def tells(self, there: str, frame: Frame) -> list[Frame]:
        late = asyncio.get_running_loop().time() >= self.until_s
        return [frame] if late or not isinstance(frame, Offer | Chunk | Have | Decided) else []

    def answers(self, there: str, frame: Frame) -> list[Frame]:
        return []


def waits(world: World, name: str) -> list[str]:
    return [
        fields["reason"] for fields in world.story_of(name, "edge") if fields["neighbour"] == "b"
    ]


def test_who_stalls_again_and_again_is_waited_for_less(tmp_path: Path) -> None:
    """Field case 40: it cost `round_limit_s` every round, and a flood of Status was progress for
    ever.
    """
    world = World(tmp_path, num_peers=3, rounds=12)
    world.catch_up_after = 100
    world.liar = Stalled(1e9)
    virtual_clock.run(world.run())
    long, short = (
        f"waited {seconds:g} s" for seconds in (PATIENCE.round_limit_s, PATIENCE.silence_s)
    )
    told = waits(world, "a")
    assert [long in reason for reason in told] == [
        number < STALLS or number in (4, 8) for number in range(12)
    ]
    assert sum(f"{short}, after" in reason for reason in told) == 12 - STALLS - 2


def test_who_delivers_again_is_waited_for_again(tmp_path: Path) -> None:
    """Field case 40: a program that was held up, not one that lies."""
    world = World(tmp_path, num_peers=3, rounds=24)
    world.catch_up_after = 100
    world.liar = Stalled(4000.0)
    virtual_clock.run(world.run())
    told = waits(world, "a")
    assert any("in vain" in reason for reason in told)
    assert told[-1] in ("both messages arrived", "decided")
    assert not any("waited" in reason for reason in told[-5:])


def test_what_no_neighbour_sent_is_not_judged() -> None:
    own, theirs = {"A": torch.ones(3), "B": torch.zeros(3)}, {"A": torch.ones(3) * 1.1}
    spread = widened({}, {"A": float((theirs["A"] - own["A"]).norm())})
    assert too_far(spread, 4, own, {"A": -torch.ones(3), "B": torch.full((3,), 1e9)}) == ["A"]
    assert too_far(spread, 4, own, {"A": torch.zeros(3), "B": torch.zeros(3)}) == [], (
        "a unit that the others have dropped"
    )
    assert expected("average").keys() == {"x", "num_peers"} and SIZE == 3
