"""Real peers' protocol in virtual time: whatever dies, is cut or is late, the run ends and the mean
is kept.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from dlora.decentralized.peer.ledger import Ledger
from dlora.errors import NeighbourError
from dlora.wire.peer.frames import Frame, Hello, Status
from kit import virtual_clock
from kit.virtual_federation import PATIENCE, World

pytestmark = pytest.mark.usefixtures("disk_of_a_virtual_world")


@pytest.mark.parametrize("topology", ["ring", "base-k", "complete", "hypercube"])
def test_undisturbed_every_edge_is_committed_and_the_mean_kept(
    tmp_path: Path, topology: str
) -> None:
    world = World(tmp_path, topology)
    virtual_clock.run(world.run())
    assert world.check_ledgers() == sum(
        len(world.topology.edges(round)) for round in range(world.rounds)
    )
    before = sum(world.start.values()).numpy()  # type: ignore[union-attr]
    np.testing.assert_allclose(world.total(), before, rtol=0, atol=1e-12)
    for consensus, num_peers in world.results.values():
        assert num_peers == 4
        np.testing.assert_allclose(consensus.numpy(), before / 4, rtol=0, atol=1e-12)
    x = np.concatenate([world.start[name].numpy() for name in world.names])
    for round in range(world.rounds):
        x = world.topology.mixing(round) @ x
    np.testing.assert_allclose(
        np.concatenate([world.commits[name][0].numpy() for name in world.names]),
        x,
        rtol=0,
        atol=1e-12,
    )


def count_faults(folder: Path, topology: str) -> dict[str, list[str]]:
    """What each peer of an undisturbed run does, in order: the places where it can die."""
    world = World(folder, topology)
    places: dict[str, list[str]] = {name: [] for name in world.names}

    def note(name: str, what: str) -> bool:
        places[name].append(what)
        return False

    world.fault = note
    virtual_clock.run(world.run())
    return places


@pytest.mark.parametrize(
    ("topology", "away_s", "every"),
    [
        pytest.param("ring", 3.0, 16, id="ring-back-at-once-at-every-sixteenth-place"),
        *(
            pytest.param(topology, away_s, 1, id=f"{topology}-{word}", marks=pytest.mark.slow)
            for topology in ("ring", "base-k")
            for word, away_s in (("back-at-once", 3.0), ("away-for-longer-than-the-bound", 200.0))
        ),
    ],
)
def test_each_peer_dead_at_each_place(
    tmp_path: Path, topology: str, away_s: float, every: int
) -> None:
    """``every``: one place of so many, for each peer another one."""
    places = count_faults(tmp_path / "undisturbed", topology)
    for first, (victim, whats) in enumerate(places.items()):
        for number in range(first % every, len(whats), every):
            if whats[number] == "Status":
                continue  # says nothing new: its neighbours see the same as at the place before
            world = World(tmp_path / f"{victim}-{number}", topology)
            asked = iter(range(len(whats) * 3))
            world.fault = lambda name, what: name == victim and next(asked) == number  # noqa: B023

            async def plan(world: World, victim: str = victim) -> None:
                while not world.tasks[victim].done():
                    await asyncio.sleep(0.05)
                await asyncio.sleep(away_s)
                world.begin(victim)

            virtual_clock.run(world.run(plan))
            assert set(world.results) == set(world.names)
            assert not any(event == "lacks" for _, _, event, _ in world.story), (
                "a crash is no older copy"
            )
            # who came back when the others had ended meets them when all resume once more
            if away_s > PATIENCE.silence_s:
                world.fault = lambda name, what: False
                virtual_clock.run(world.run())
            world.check_ledgers()
            before = sum(world.start.values()).numpy()  # type: ignore[union-attr]
            np.testing.assert_allclose(
                world.total(),
                before,
                rtol=0,
                atol=1e-12,
                err_msg=f"{victim} died at {whats[number]}",
            )


@pytest.mark.parametrize("at_s", np.arange(0.1, 4.5, 0.4).round(1).tolist())
@pytest.mark.parametrize("for_s", [0.5, 100.0])
def test_a_link_is_cut_and_mended(tmp_path: Path, at_s: float, for_s: float) -> None:
    world = World(tmp_path, rounds=6)

    async def plan(world: World) -> None:
        await asyncio.sleep(at_s)
        world.hub.cut("a", "b")
        await asyncio.sleep(for_s)
        world.hub.mend("a", "b")

    virtual_clock.run(world.run(plan))
    committed = world.check_ledgers()
    assert committed >= 6 * 4 - 6, "only the edge that was cut may be left out"
    np.testing.assert_allclose(world.total(), sum(world.start.values()).numpy(), rtol=0, atol=1e-12)  # type: ignore[union-attr]
    assert {num_peers for _, num_peers in world.results.values()} == {4}


@pytest.mark.parametrize("at_s", [0.1, 1.05, 1.15, 2.4])
@pytest.mark.parametrize(
    "ways", [[("a", "b")], [("b", "a")], [(x, y) for x in "abd" for y in "abd" if "a" in (x, y)]]
)
def test_one_way_loss_and_a_pause_longer_than_the_bound(
    tmp_path: Path, at_s: float, ways: list[tuple[str, str]]
) -> None:
    """Frames are held back one way (a cut nobody notices), or all of a's are (a process that was
    stopped).
    """
    world = World(tmp_path, rounds=6)

    async def plan(world: World) -> None:
        await asyncio.sleep(at_s)
        for way in ways:
            world.hub.way(*way).clear()
        await asyncio.sleep(130)
        for way in ways:
            world.hub.way(*way).set()

    virtual_clock.run(world.run(plan))
    if any(world.doubts()):
        virtual_clock.run(world.run())  # the others had ended when a came back
    assert world.check_ledgers() > 0
    np.testing.assert_allclose(world.total(), sum(world.start.values()).numpy(), rtol=0, atol=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]
)
@pytest.mark.parametrize("topology", ["ring", pytest.param("base-k", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("rate", "tolerance"), [(0.0, 1e-11), (0.1, 1e-2)])
def test_a_fifth_of_the_exchanges_fails(
    tmp_path: Path, topology: str, seed: int, rate: float, tolerance: float
) -> None:
    """Each with a cut at a random frame of the exchange; the mean over peers stays the undisturbed
    run's.

    Exactly, while nothing trains. With training a difference that comes late has missed the
    shrinking in between.
    """
    rounds = 30
    disturbed, undisturbed = (
        World(tmp_path / kind, topology, rounds=rounds, rate=rate)
        for kind in ("disturbed", "undisturbed")
    )
    draw = np.random.default_rng(seed)
    fails = {
        (edge, round): draw.random() < 0.2
        for round in range(rounds)
        for edge in disturbed.topology.edges(round)
    }
    frames = {key: int(draw.integers(1, 8)) for key, failing in fails.items() if failing}

    def cut(world: World, here: str, there: str, frame: Frame) -> None:
        if isinstance(frame, Hello | Status):
            return
        round = world.rounds_now[here]
        edge = (
            min(map(world.names.index, (here, there))),
            max(map(world.names.index, (here, there))),
        )
        left = frames.get((edge, round))
        if left is not None:
            frames[edge, round] = left - 1
            if left == 1:
                world.hub.cut(here, there)
                asyncio.get_running_loop().call_later(
                    PATIENCE.silence_s + 10, world.hub.mend, here, there
                )

    disturbed.on_frame = cut
    disturbed.catch_up_after = rounds  # what is taken over from neighbours keeps no mean
    for world in (disturbed, undisturbed):
        virtual_clock.run(world.run())
    lost = (
        sum(len(disturbed.topology.edges(round)) for round in range(rounds))
        - disturbed.check_ledgers()
    )
    assert lost > 0.05 * len(fails), "the faults did not happen"
    np.testing.assert_allclose(disturbed.total(), undisturbed.total(), rtol=0, atol=tolerance)


def test_a_peer_that_was_away_for_long_takes_its_neighbours_state(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=60, rate=0.1)
    world.catch_up_after = 5

    async def plan(world: World) -> None:
        await asyncio.sleep(2.0)
        world.kill("b")
        await asyncio.sleep(PATIENCE.silence_s + 20)
        world.begin("b")

    virtual_clock.run(world.run(plan))
    caught_up = [
        fields for _, name, event, fields in world.story if event == "caught-up" and name == "b"
    ]
    assert len(caught_up) == 1 and caught_up[0]["round"] - caught_up[0]["was"] > 5
    world.check_ledgers()
    assert {num_peers for _, num_peers in world.results.values()} == {4}


def test_a_doubt_about_a_round_that_the_decider_skipped_is_settled(tmp_path: Path) -> None:
    """a dies holding b's promise but not b's message, catches up past that round, and must say that
    it was dropped.
    """
    world = World(tmp_path, rounds=60, rate=0.1)
    world.catch_up_after = 5
    told: list[str] = []

    def fault(name: str, what: str) -> bool:
        if (name, what) == ("b", "after promised") and not told:
            world.hub.way("b", "a").set()
            told.append("promised")
        if (name, what) == ("b", "Chunk") and not told:
            world.hub.way("b", "a").clear()  # b's message stays on its way until b has promised
        if (name, what) == ("a", "arrived") and told == ["promised"]:
            told.append("dead")
            return True
        return False

    world.fault = fault

    async def plan(world: World) -> None:
        while not world.tasks["a"].done():
            await asyncio.sleep(0.1)
        await asyncio.sleep(PATIENCE.silence_s + 20)
        world.begin("a")

    virtual_clock.run(world.run(plan))
    assert world.story_of("a", "caught-up")
    told_b = [
        fields
        for fields in world.story_of("b", "edge")
        if fields["round"] == 0 and fields["neighbour"] == "a"
    ]
    assert [fields["committed"] for fields in told_b] == [None, False], "in doubt, then dropped"
    world.check_ledgers()
    assert max(time for time, *_ in world.story) < PATIENCE.round_limit_s, (
        "nobody waited for an answer that does not come"
    )


def test_what_was_once_offered_never_changes(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = ledger.keep("round-000003", b"what my neighbour may have")
    ledger.close()
    again = Ledger(tmp_path)
    assert again.keep("round-000003", b"what training gives this time") == first
    assert first.path.read_bytes() == b"what my neighbour may have"
    again.close()


def test_a_dead_neighbour_is_waited_for_once(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=20)

    async def plan(world: World) -> None:
        await asyncio.sleep(2.0)
        world.kill("b")

    virtual_clock.run(world.run(plan))
    ends = max(time for time, name, _, _ in world.story if name == "c")
    assert ends < 20 * 1.3 + 4 * PATIENCE.silence_s, "once in its round, and at the end"
    assert {name: num for name, (_, num) in world.results.items()} == {
        "a": 2,
        "c": 1,
        "d": 2,
    }, "c hung below b"


def test_another_run_is_refused_and_the_key_named_on_both_sides(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.manifests["b"] = '{"r":16}'
    with pytest.raises(NeighbourError) as caught:
        virtual_clock.run(world.run())
    assert str(caught.value) == "b is in another run: r is 8 at a and 16 at b; make them alike"
    told = {name: fields["reason"] for _, name, event, fields in world.story if event == "refused"}
    assert told["b"] in (
        "a is in another run: r is 16 at b and 8 at a; make them alike",
        "c is in another run: r is 16 at b and 8 at c; make them alike",
    )
    assert set(world.commits) <= {"d"}, "d knows only a and c, who stopped; it goes on alone"
