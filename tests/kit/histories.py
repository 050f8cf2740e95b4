"""Histories of a run: random faults with one lying member among them, played in virtual time, and
what must hold after.

A search that goes on, prints the shortest history of each failure and then looks for the next:

    python tests/kit/histories.py --seconds 3600
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import hashlib
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dlora.decentralized.peer.ledger import Due
from dlora.decentralized.peer.life import FASTER
from dlora.decentralized.peer.messages_on_disk import round_message, round_of
from dlora.errors import RunError
from dlora.wire.peer.frames import Chunk, Decided, Frame, Have, Hello, Offer, Shown, Status, Want
from dlora.wire.tensors import decode_tensors, encode
from kit import virtual_clock
from kit.virtual_federation import PATIENCE, SIZE, FaultyLedger, World, expected

FASTEST_ROUND_S = 1.0  # of any peer of a world
LIES = (
    "ahead",
    "claims",
    "scaled",
    "two faces",
    "flips",
    "promises",
    "decides",
    "keeps back",
    "floods",
    "counts",
)


@dataclass(frozen=True)
class Stop:
    """A peer ends at the ``place``-th thing it does: killed, or because its disk is full. It starts
    again.
    """

    name: str
    place: int
    away_s: float
    disk_full: bool = False


@dataclass(frozen=True)
class Restore:
    """Somebody copies a peer's folder at the ``copied``-th thing it does, ends the peer ``lived``
    things later, and puts the copy back. It starts again from there.
    """

    name: str
    copied: int
    lived: int
    away_s: float

    @property
    def place(self) -> int:
        return self.copied + self.lived


@dataclass(frozen=True)
class Cut:
    """No link between two peers for a while."""

    one: str
    two: str
    at_s: float
    for_s: float


@dataclass(frozen=True)
class Hold:
    """Frames wait on their way from one peer to another, which nobody notices; both ways and to
    all: a stopped process.
    """

    here: str
    there: str  # "*": everybody, both ways
    at_s: float
    for_s: float


@dataclass(frozen=True)
class Slow:
    """A peer's local steps of one round take longer, while it says where it is."""

    name: str
    round: int
    for_s: float


@dataclass(frozen=True)
class Lag:
    """Every frame of a peer takes so much longer."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Lie:
    """What the liar does, from its ``after``-th frame on, to those neighbours whose number is in
    ``to``.
    """

    kind: str
    value: float
    after: int = 0
    to: frozenset[int] = frozenset(range(5))


Fault = Stop | Restore | Cut | Hold | Slow | Lag


@dataclass(frozen=True)
class History:
    """One run."""

    topology: str
    num_peers: int
    rounds: int
    catch_up_after: int
    faults: tuple[Fault, ...] = ()
    lies: tuple[Lie, ...] = ()  # of peer ``liar``
    liar: str = "b"


NAMES = st.sampled_from("abcde")
SECONDS = st.sampled_from([0.0, 0.5, 2.0, 8.0, 55.0, 65.0, 200.0, 700.0])
WHEN = st.floats(0.0, 30.0).map(lambda at: round(at, 1))
FAULTS: st.SearchStrategy[Fault] = st.one_of(
    st.builds(Stop, NAMES, st.integers(0, 300), SECONDS, st.booleans()),
    st.builds(
        Restore, NAMES, st.integers(0, 150), st.integers(1, 12) | st.integers(1, 150), SECONDS
    ),
    st.builds(Cut, NAMES, NAMES, WHEN, SECONDS),
    st.builds(Hold, NAMES, NAMES | st.just("*"), WHEN, SECONDS),
    st.builds(Slow, NAMES, st.integers(0, 12), SECONDS),
    st.builds(Lag, NAMES, st.sampled_from([0.1, 1.5, 20.0])),
)
VALUES = st.sampled_from([0.0, 1.0, -1.0, -5.0, 9.0, 1e3, 1e12, 1e30])
LIE = st.builds(
    Lie,
    st.sampled_from(LIES),
    VALUES,
    st.integers(0, 60),
    st.frozensets(st.integers(0, 4), min_size=1),
)
HISTORIES = st.builds(
    History,
    st.sampled_from(["ring", "complete", "base-k"]),
    st.sampled_from([3, 4, 2, 5]),
    st.integers(1, 14),
    st.sampled_from([2, 3, 10]),
    st.lists(FAULTS, max_size=4).map(tuple),
    st.just(()) | st.lists(LIE, min_size=1, max_size=2).map(tuple),
    st.sampled_from("abcde"),
)


class Member:
    """A liar: it runs the program, and tells what ``lies`` make of each frame."""

    def __init__(self, world: World, name: str, lies: tuple[Lie, ...]) -> None:
        self.world, self.name, self.lies = world, name, lies
        self.told = 0
        self.contents: dict[tuple[str, str], bytes] = {}  # of what it has told: the same for ever
        self.claimed = round_message(world.rounds - 1)

    def _to(self, there: str) -> list[Lie]:
        number = self.world.names.index(there)
        return [lie for lie in self.lies if number in lie.to and self.told >= lie.after]

    def tells(self, there: str, frame: Frame) -> list[Frame]:
        self.told += 1
        frames = [frame]
        for lie in self._to(there):
            frames = [told for frame in frames for told in self._lie(lie, there, frame)]
        return [self._content(there, told) for told in frames]

    def _lie(self, lie: Lie, there: str, frame: Frame) -> list[Frame]:
        match lie.kind, frame:
            case "ahead", Status(round):
                return [Status(round + int(min(abs(lie.value), 1000)))]
            case "ahead", Hello(_, _, round):
                return [replace(frame, round=round + int(min(abs(lie.value), 1000)))]
            case "claims", Status():
                self.contents.setdefault(
                    (there, self.claimed), self._message(self.claimed, lie.value)
                )
                return [frame, self._offer(there, self.claimed)]
            case "claims", Offer(name) if round_of(name) is not None:
                return []
            case "flips", Decided(round, committed):
                return [replace(frame, committed=not committed)]
            case "promises", Status(round) if there < self.name:
                return [frame, Have(round), Have(max(0, round - 1)), Have(round + 1)]
            case "decides", Status(round) if self.name < there:
                return [
                    frame,
                    Decided(round, lie.value > 0),
                    Decided(max(0, round - 1), lie.value > 0),
                ]
            case "keeps back", _:
                kind = (Chunk, Have, Decided, Offer, Status)[int(abs(lie.value)) % 5]
                return [] if isinstance(frame, kind) else [frame]
            case "floods", _:
                return [frame, *[Status(getattr(frame, "round", 0))] * 20]
        return [frame]

    def answers(self, there: str, frame: Frame) -> list[Frame]:
        if (
            isinstance(frame, Want)
            and (there, frame.name) in self.contents
            and self.world_own(frame.name) is None
        ):
            return [
                Chunk(frame.name, frame.offset, self.contents[there, frame.name][frame.offset :])
            ]
        return []

    def world_own(self, name: str) -> Path | None:
        sent = self.world.folder / self.name / "sent"
        return next(sent.glob(f"{name}.*.safetensors"), None)

    def _content(self, there: str, frame: Frame) -> Frame:
        """An offer and its bytes, as the lies about contents make them."""
        if not isinstance(frame, Offer | Chunk):
            return frame
        if (there, frame.name) not in self.contents:
            own = self.world_own(frame.name)
            if own is None:
                return frame
            self.contents[there, frame.name] = self._changed(there, frame.name, own)
        if isinstance(frame, Offer):
            return self._offer(there, frame.name)
        return Chunk(
            frame.name,
            frame.offset,
            self.contents[there, frame.name][frame.offset :][: len(frame.data)],
        )

    def _offer(self, there: str, name: str) -> Offer:
        content = self.contents[there, name]
        return Offer(name, len(content), hashlib.sha256(content).hexdigest())

    def _changed(self, there: str, name: str, own: Path) -> bytes:
        tensors = decode_tensors(own, expected(name))
        for lie in self._to(there):
            if lie.kind == "scaled" or (
                lie.kind == "two faces" and self.world.names.index(there) % 2
            ):
                tensors["x"] = tensors["x"] * lie.value
            if lie.kind == "counts" and "num_peers" in tensors:
                tensors["num_peers"] = torch.full_like(tensors["num_peers"], abs(lie.value))
        return encode(tensors, torch.float64)

    def _message(self, name: str, value: float) -> bytes:
        return encode({"x": torch.full((SIZE,), value)}, torch.float64)


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
                if stop.place == asked[name] - 1:
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
