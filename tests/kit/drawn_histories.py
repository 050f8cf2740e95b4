"""What a history is: faults, lies, and how hypothesis draws them."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

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
