"""The events by which a peer tells what happens between it and its neighbours."""

from __future__ import annotations

from typing import Literal

from dlora.events.timed import Timed


class Linked(Timed):
    """A link with a neighbour is up; ``round`` is the round that the neighbour is in."""

    event: Literal["linked"]
    neighbour: str
    round: int


FINISHED = "it has finished"  # the reason of Unlinked when the neighbour has done its last round


class Unlinked(Timed):
    """A link with a neighbour has ended."""

    event: Literal["unlinked"]
    neighbour: str
    reason: str


class RoundMixed(Timed):
    """A training script has mixed a round; ``neighbours``: those with which it was mixed."""

    event: Literal["mixed"]
    round: int
    neighbours: list[str]
    wait_s: float
    num_bytes: int
    distance: float


class Refused(Timed):
    """A neighbour is in another run: it and this peer refuse each other."""

    event: Literal["refused"]
    neighbour: str
    reason: str


class EdgeEnded(Timed):
    """A round's edge is mixed, or left out; ``committed`` None: the neighbour decides later."""

    event: Literal["edge"]
    neighbour: str
    round: int
    committed: bool | None
    reason: str


class NotBelieved(Timed):
    """A neighbour's message is not believed, so it is not mixed."""

    event: Literal["implausible"]
    neighbour: str
    message: str
    reason: str


class Doubtful(Timed):
    """A sum or an average is taken, although it is far from everything that this peer has seen."""

    event: Literal["doubtful"]
    neighbour: str
    message: str
    reason: str


class NotFetched(Timed):
    """A message that this peer asked for did not come."""

    event: Literal["not-fetched"]
    neighbour: str
    message: str
    reason: str


class NotFollowed(Timed):
    """A neighbour says that it is far ahead; this peer does not take its state."""

    event: Literal["not-followed"]
    neighbour: str
    reason: str


class OtherContent(Timed):
    """A neighbour has another average than this peer, or did not say which."""

    event: Literal["other-content"]
    neighbour: str
    message: str
    reason: str


class EndedWithout(Timed):
    """This peer ended while a neighbour had not."""

    event: Literal["ended-without"]
    neighbour: str
    reason: str
    in_doubt: int  # rounds that the neighbour has not decided


class LeftOut(Timed):
    """A neighbour's part is not in the average."""

    event: Literal["left-out"]
    neighbour: str
    reason: str


class Lacks(Timed):
    """A neighbour's folder lacks edges that it has signed; ``shown`` of them are shown to it."""

    event: Literal["lacks"]
    neighbour: str
    round: int  # the last one
    edges: int
    shown: int
    reason: str


class TwoFolders(Timed):
    """A neighbour has this peer's signature from another folder than this one."""

    event: Literal["two-folders"]
    neighbour: str
    reason: str


class CaughtUp(Timed):
    """This peer was far behind and took its neighbours' state."""

    event: Literal["caught-up"]
    round: int  # that it goes on with
    was: int  # that it was in
    neighbours: list[str]  # that were ahead


NeighbourEvent = (
    Linked
    | Unlinked
    | Refused
    | EdgeEnded
    | RoundMixed
    | NotBelieved
    | Doubtful
    | NotFetched
    | NotFollowed
    | OtherContent
    | EndedWithout
    | LeftOut
    | Lacks
    | TwoFolders
    | CaughtUp
)
