"""Histories of a run: random faults with one lying member among them, played in virtual time, and
what must hold after.

A search that goes on, prints the shortest history of each failure and then looks for the next:

    python tests/kit/histories.py --seconds 3600
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, settings

from dlora.decentralized.peer.ledger import Due
from dlora.decentralized.peer.life import FASTER
from dlora.errors import RunError
from dlora.wire.peer.frames import Chunk, Decided, Have, Hello, Offer, Shown, Status, Want
from dlora.wire.tensors import decode_tensors
from kit import virtual_clock
from kit.drawn_histories import HISTORIES, Cut, Fault, History, Hold, Lag, Restore, Slow, Stop
from kit.history_liar import Member
from kit.virtual_federation import PATIENCE, FaultyLedger, World, expected

FASTEST_ROUND_S = 1.0  # of any peer of a world


@dataclass
class Played:
    """What one history did."""

    history: History
    world: World
    honest: list[str]
    mixed: dict[tuple[str, int, str], tuple[bytes, bytes]] = field(
        default_factory=dict
    )  # (peer, round, neighbour): own, theirs
    # whose folder was replaced by an older copy, and who has ended because of that
    restored: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    # when, who, to which round, where others were
    jumps: list[tuple[float, str, int, int]] = field(default_factory=list)


class HistoryWorld(World):
    """A world that notes what is mixed and who jumps where."""

    played: Played

    def make_ledger(self, name: str) -> FaultyLedger:
        return NotingLedger(self, name)

    def heard(self, name: str, event: str, fields: dict[str, Any]) -> None:
        if event == "caught-up":
            others = [
                round
                for other, round in self.rounds_now.items()
                if other in self.played.honest and other != name
            ]
            now = asyncio.get_running_loop().time()
            self.played.jumps.append((now, name, fields["round"], max(others, default=0)))


class NotingLedger(FaultyLedger):
    def due(self, *args: Any, **kwargs: Any) -> Iterator[Due]:
        assert isinstance(self.world, HistoryWorld)
        for due in super().due(*args, **kwargs):
            self.world.played.mixed[self.name, due.round, due.neighbour] = (
                due.own.read_bytes(),
                due.theirs.read_bytes(),
            )
            yield due


class Copy:
    """What a peer had on its disk at one moment."""

    def __init__(self, world: World, name: str, place: Path) -> None:
        self.world, self.name, self.commit = world, name, world.commits.get(name)
        self.place = shutil.copytree(world.folder / name, place)

    def put_back(self) -> None:
        """The peer does not run; what it has now is gone."""
        shutil.rmtree(self.world.folder / self.name)
        shutil.copytree(self.place, self.world.folder / self.name)
        self.world.commits.pop(self.name, None)
        if self.commit is not None:
            self.world.commits[self.name] = self.commit


def play(history: History, folder: Path) -> Played:
    """Play a history, faults first, then all start once more without faults; what it did."""
    world = HistoryWorld(folder, history.topology, history.num_peers, history.rounds)
    world.catch_up_after = history.catch_up_after
    lying = bool(history.lies) and history.liar in world.names
    if lying:
        world.liar = Member(world, history.liar, history.lies)
    played = world.played = Played(
        history, world, [name for name in world.names if not (lying and name == history.liar)]
    )
    faults = [fault for fault in history.faults if _concerned(fault) <= {*world.names, "*"}]
    stops = {
        name: [
            fault for fault in faults if isinstance(fault, Stop | Restore) and fault.name == name
        ]
        for name in world.names
    }
    asked = dict.fromkeys(world.names, 0)
    copies: dict[Restore, Copy] = {}
    due_back: dict[str, Copy] = {}

    def fault(name: str, what: str) -> bool:
        asked[name] += 1
        for stop in stops[name]:
            if isinstance(stop, Restore):
                if stop.copied == asked[name] - 1:
                    copies[stop] = Copy(world, name, folder / f"copy-{len(copies)}-of-{name}")
                if stop.place == asked[name] - 1 and stop in copies:
                    due_back[name] = copies[stop]
            elif stop.place == asked[name] - 1 and stop.disk_full and what not in FRAME_NAMES:
                raise OSError(errno.ENOSPC, "No space left on device", str(folder / name))
            if stop.place == asked[name] - 1:
                return True
        return False

    world.fault = fault
    for event in faults:
        match event:
            case Slow(name, number, for_s):
                world.steps_s[name, number] = for_s
            case Lag(name, seconds):
                world.lag_s[name] = seconds
    limit_s = _bound(history)
    virtual_clock.run(_first(world, faults, stops, due_back, limit_s))
    world.fault = lambda name, what: False
    world.steps_s.clear()
    world.lag_s.clear()
    virtual_clock.run(_again(world, limit_s))
    return played


FRAME_NAMES = {kind.__name__ for kind in (Hello, Status, Offer, Want, Chunk, Have, Decided, Shown)}


def _concerned(fault: Fault) -> set[str]:
    match fault:
        case Cut(one, two) | Hold(one, two):
            return {one, two}
        case Stop(name) | Restore(name) | Slow(name) | Lag(name):
            return {name}


def _bound(history: History) -> float:
    """Every wait has a limit, so the run has one, whoever lies."""
    lost_s = sum(getattr(fault, "away_s", getattr(fault, "for_s", 0.0)) for fault in history.faults)
    waits = history.rounds + 4 * history.num_peers + 6 * (1 + len(history.faults))
    return lost_s + waits * (PATIENCE.round_limit_s + 60.0)


async def _life(world: HistoryWorld, name: str) -> None:
    """Start a peer and wait for its end; one whose folder is an older copy may say so and end."""
    played = world.played
    try:
        await world.begin(name)
    except RunError as error:
        if name not in played.restored or "is an older copy, or the key of" not in str(error):
            raise
        assert "\n" not in str(error)
        played.lost.add(name)


async def _first(
    world: HistoryWorld,
    faults: list[Fault],
    stops: dict[str, list[Stop | Restore]],
    due_back: dict[str, Copy],
    limit_s: float,
) -> None:
    async def live(name: str) -> None:
        """Start a peer, and again each time a fault has ended it."""
        for stop in [*sorted(stops[name], key=lambda stop: stop.place), None]:
            try:
                await _life(world, name)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():  # this one, not the peer
                    raise
            except (OSError, RunError) as error:
                if "No space left" not in str(error):
                    raise
            if name in world.results or name in world.played.lost or stop is None:
                return
            if name in due_back:
                due_back.pop(name).put_back()
                world.played.restored.add(name)
            await asyncio.sleep(stop.away_s)

    async def happen(fault: Fault) -> None:
        match fault:
            case Cut(one, two, at_s, for_s) if one != two:
                await asyncio.sleep(at_s)
                world.hub.cut(one, two)
                await asyncio.sleep(for_s)
                world.hub.mend(one, two)
            case Hold(here, there, at_s, for_s):
                others = [name for name in world.names if name != here]
                ways = [(here, there)]
                if there == "*":
                    ways = [(here, other) for other in others] + [(other, here) for other in others]
                await asyncio.sleep(at_s)
                for way in ways:
                    world.hub.way(*way).clear()
                await asyncio.sleep(for_s)
                for way in ways:
                    world.hub.way(*way).set()

    happening = [asyncio.create_task(happen(fault)) for fault in faults]
    await _all(
        world, [asyncio.create_task(live(name)) for name in world.names], world.names, limit_s
    )
    for task in happening:
        task.cancel()
    await asyncio.gather(*happening, return_exceptions=True)
    for one, two in itertools.combinations(world.names, 2):
        world.hub.mend(one, two)
        for way in ((one, two), (two, one)):
            world.hub.way(*way).set()


async def _again(world: HistoryWorld, limit_s: float) -> None:
    world.results.clear()
    world.played.lost.clear()
    lives = [asyncio.create_task(_life(world, name)) for name in world.names]
    await _all(world, lives, world.names, limit_s)


async def _all(
    world: World, lives: list[asyncio.Task[None]], names: tuple[str, ...], limit_s: float
) -> None:
    """Until everybody honest has ended; the liar may go on for ever."""
    liar = world.liar.name if world.liar else None
    honest = [task for name, task in zip(names, lives, strict=True) if name != liar]
    _, waiting = await asyncio.wait(honest, timeout=limit_s)
    late = [name for name, task in zip(names, lives, strict=True) if task in waiting]
    for task in lives:
        task.cancel()
    ended = await asyncio.gather(*lives, return_exceptions=True)
    assert not late, f"{', '.join(late)} still run after {limit_s:g} s"
    for task, outcome in zip(lives, ended, strict=True):
        if task in honest and isinstance(outcome, BaseException):
            raise outcome


def check(played: Played) -> None:
    """What holds after every history; AssertionError says what does not."""
    world, rounds = played.world, played.history.rounds
    # what is lost to a folder is wrong there only
    honest = [name for name in played.honest if name not in played.lost]
    assert not world.broken, f"a conversation ended with {world.broken[0]!r}"
    liar = world.liar.name if world.liar else ""
    known = {name: world.ledger(name) for name in honest}
    doubts = dict(zip(world.names, world.doubts_with(), strict=True))
    for one, two in itertools.combinations(honest, 2):
        # one that has caught up from an older copy holds in its state what its ledger lacks
        since = max(
            world.commits[name][1].since_round if name in played.restored else 0
            for name in (one, two)
        )
        both = [
            {round for round, other in known[end] if other == far and round >= since}
            for end, far in ((one, two), (two, one))
        ]
        assert both[0] == both[1], (
            f"{one} and {two} know other committed rounds: {sorted(both[0] ^ both[1])}"
        )
        assert not doubts[one].get(two) and not doubts[two].get(one), (
            f"{one} and {two} are in doubt: {doubts}"
        )
    for when, name, to, others in played.jumps:
        if name not in honest:
            continue
        if len(world.neighbours(name)) == 1:  # that one is believed as far as the clock allows
            most = FASTER * when / FASTEST_ROUND_S + 1
            assert to <= most, (
                f"at {when:.1f} s {name} went to round {to}, more than its clock allows"
            )
        else:
            assert to <= others + 1, (
                f"{name} went to round {to}, and no honest peer was beyond {others}"
            )
    for name in honest:
        assert name in world.results, f"{name} did not come to the end"
        assert world.commits[name][0].isfinite().all(), f"the factors of {name} are not finite"
        assert world.commits[name][1].rounds_done >= rounds
        if not any(who == name for _, who, _, _ in played.jumps):
            assert set(world.trained[name]) >= set(range(rounds)), (
                f"{name} trained {world.trained[name]} of {rounds}"
            )
    for (name, round, other), (own, theirs) in played.mixed.items():
        back = played.mixed.get((other, round, name))
        if back is not None and {name, other} <= set(honest):
            assert back == (
                theirs,
                own,
            ), f"{name} and {other} mixed other messages in round {round}"
    if not any(name in honest for _, name, _, _ in played.jumps):
        before = sum(world.start[name] for name in honest)
        for (name, round, other), messages in played.mixed.items():
            if name in honest and other not in honest:
                here, there = (
                    decode_tensors(content, expected("round-000000"))["x"] for content in messages
                )
                row = world.topology.mixing(round)[world.names.index(name)]
                before = before + row[world.names.index(other)] * (there - here)
        after = sum(world.commits[name][0] for name in honest)
        assert isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
        bound = 1e-9 * max(1.0, float(before.abs().max()))
        assert (after - before).abs().max() <= bound, f"the mean moved: {before} became {after}"
    if not liar and not played.lost:
        averages = {world.results[name][0].numpy().tobytes() for name in honest}
        counts = {world.results[name][1] for name in honest}
        assert counts == {len(honest)}, (
            f"all were there at the end, and the averages are of {counts}"
        )
        assert len(averages) == 1, "the averages differ"


def search(
    seconds: float, folder: Path, say: Callable[[str], None], max_examples: int = 200
) -> None:
    """Play new histories until ``seconds`` have gone; say the shortest of each failure."""
    folder.mkdir(parents=True, exist_ok=True)
    began_at, count, found = time.monotonic(), 0, 0
    seen: set[str] = set()
    for seed in itertools.count(int(began_at)):
        if time.monotonic() - began_at > seconds:
            break

        @hypothesis.seed(seed)
        @settings(
            max_examples=max_examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @hypothesis.given(HISTORIES)
        def passes(history: History) -> None:
            nonlocal count
            count += 1
            try:
                try_history(history, folder)
            except Exception as error:
                kind = f"{type(error).__name__}: {error}"[:40]
                if kind not in seen:
                    seen.add(kind)
                    say(f"first seen after {count} examples: {error!r}\n    {history}")
                raise

        try:
            passes()
        except Exception as error:  # several kinds at once come as a group
            found += 1
            notes = [note for note in getattr(error, "__notes__", [])]
            say(
                f"--- failure {found} after {count} examples, seed {seed},"
                f" {time.monotonic() - began_at:.0f} s"
            )
            for one in getattr(error, "exceptions", [error]):
                say(f"{one!r}\n" + "\n".join(getattr(one, "__notes__", notes)))
        say(f"{count} examples, {time.monotonic() - began_at:.0f} s, {found} failures")


def try_history(history: History, folder: Path) -> None:
    """Play and check one history in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        check(play(history, Path(place)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    search(arguments.seconds, arguments.folder, lambda line: print(line, flush=True))
