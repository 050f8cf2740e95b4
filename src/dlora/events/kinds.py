"""The events of a run: each is made as one of these types, with these fields, and read as it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, cast

from dlora.events.neighbours import NeighbourEvent
from dlora.events.timed import Certificate, ConnectionRefused, Loading, Timed

Scores = dict[str, float]


class Start(Timed):
    """The first line of a log: what is about to run, and on what.

    Its attributes are the fields of that line.
    """

    event: Literal["start"]
    version: str
    model: str
    task: str
    metric: str
    runs: list[str]  # the names of the arms
    own: NotRequired[str]  # the one participant whose data are at hand
    split: NotRequired[dict[str, Any]]
    participation: NotRequired[float]  # if not all peers take part in each round
    ranks: NotRequired[int]  # if there are several
    data: dict[str, Any]
    warnings: list[str]
    peers: list[dict[str, Any]]  # name, rows, labels
    edges: list[Sequence[tuple[int, int]]]  # for each round of the topology's period
    spectral_gap: float
    trainable_parameters: int
    message_bytes: int
    group_size: int


class OneAtATime(Timed):
    """The participants train one at a time, although memory would allow more."""

    event: Literal["one-at-a-time"]
    reason: str


class ArmBegins(Timed):
    """An arm of the run begins, or goes on."""

    event: Literal["run"]
    run: str
    rounds: int
    local_steps: list[int]  # of each participant in a round; version 0.1.0 did not write it
    participants: int


class Resumed(Timed):
    """An arm goes on from a checkpoint."""

    event: Literal["resumed"]
    run: str
    rounds_done: int


class Units(Timed):
    """The units that the schedule of an arm activates and kills."""

    event: Literal["units"]
    run: str
    units: list[dict[str, Any]]  # modules, cost
    device_flops: int  # for a token, with all units active


class Active(Timed):
    """The active set of one participant, from local step ``step`` on.

    The two fractions compare what was spent so far with what all units would have spent.
    """

    event: Literal["active"]
    run: str
    peer: str
    step: int
    epoch: int
    units: list[int]
    utility: list[float | None]  # of each unit, as last known
    device_flops: int  # for a token
    adapter_fraction: float
    device_flops_fraction: float


class Saved(TypedDict, total=False):
    """What a schedule has spent, as a fraction of what all units would have spent."""

    adapter_fraction: float
    adapter_fraction_after_warmup: float
    device_flops_fraction: float
    device_flops_fraction_after_warmup: float


class Cost(Timed):
    """What an arm has cost so far, in all its processes."""

    bytes_on_wire: int  # between peers
    cloud_bytes: NotRequired[int]  # with a cloud, where one takes part
    seconds: float  # of training and exchange


class RoundDone(Cost):
    """A round is done. A real peer knows only its own loss, and no distance."""

    event: Literal["round"]
    run: str
    round: int
    loss: float  # the mean
    losses: list[float]  # of each participant
    learning_rate: float  # of the last local step
    consensus_distance: float | None


class RoundScored(Cost):
    """Scores of the average of all peers, of peers by themselves, or of both."""

    event: Literal["scores"]
    run: str
    rounds_done: int
    consensus: Scores | None
    peers: dict[str, Scores] | None
    peers_mean: Scores | None
    peers_mean_error: Scores | None  # where ``peers`` are a sample


class ArmDone(Cost, Saved):
    """An arm has done all its rounds and is scored."""

    event: Literal["run-done"]
    run: str
    consensus: Scores
    peers_mean: Scores | None


class Done(Timed):
    """Everything is trained and scored; ``seconds`` since the runs of this process began."""

    event: Literal["done"]
    seconds: float


class CloudNews(Timed):
    """The link with this device's cloud was lost, or none can be had; or it is silent, or back."""

    event: Literal["cloud-lost", "cloud-away", "cloud-silent", "cloud-back"]
    reason: str


class Loaded(Timed):
    """A tick: everything is loaded. From here on a stop may cost work."""

    event: Literal["loaded"]


class Phase(Timed):
    """A tick: what the program waits for."""

    event: Literal["phase"]
    text: str


class StepDone(Timed):
    """A tick: local steps of all participants, ``done`` of the ``total`` of all rounds."""

    event: Literal["step"]
    run: str
    done: int
    total: int


class Evaluating(Timed):
    """A tick: batches that are scored, ``done`` of ``total``."""

    event: Literal["evaluating"]
    run: str
    what: str
    done: int
    total: int


Tick = Loading | Loaded | Phase | StepDone | Evaluating
Logged = (
    Start
    | OneAtATime
    | ArmBegins
    | Resumed
    | Units
    | Active
    | RoundDone
    | RoundScored
    | ArmDone
    | Done
    | CloudNews
    | Certificate
    | ConnectionRefused
    | NeighbourEvent
)
Event = Logged | Tick


def as_event(line: Mapping[str, Any]) -> Event:
    """A line of a log as its type. A line of another kind is none of these types."""
    return cast(Event, line)
