"""The arms of a comparison: who exchanges factors, whose data are pooled, which score counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Baseline: TypeAlias = Literal["pooled", "local", "fedavg"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train on the same data from the same seed."""

    name: str  # in config, log, summary and checkpoints
    title: str  # as people read it
    meaning: str = ""  # a sentence of the page, after the title
    result: str = ""  # a part of the page's first sentence; {} is replaced by the arm's score
    against: str = ""  # the name of the main arm's difference from this arm
    talks: Literal["as configured", "with all", "with nobody"] = "with nobody"
    pooled: bool = False  # all data belong to one participant
    # which score counts: that of the average adapter, or the mean of the peers' own scores
    counts: Literal["consensus", "peers_mean"] = "consensus"
    # a baseline is plain LoRA: it has no schedule and no configured rule, and writes no adapters
    baseline: bool = True


DEC_LORA = Arm(
    name="dec-lora",
    title="Dec-LoRA",
    meaning=(
        "each peer trains on its own data and averages its adapter with its neighbours' after every"
        " round."
    ),
    talks="as configured",
    baseline=False,
)
DLORA = Arm(
    name="dlora",
    title="DLoRA",
    meaning=(
        "data, labels, adapter and optimiser stay on the device; the layers of the frozen model run"
        " in its cloud."
    ),
    baseline=False,
)
POOLED = Arm(
    name="pooled",
    title="Pooled",
    meaning=(
        "all data in one place, one adapter: what peers would reach if they could share their rows."
    ),
    result="training on the pooled data {}",
    against="against pooling all data",
    pooled=True,
)
LOCAL = Arm(
    name="local",
    title="Alone",
    meaning=(
        "each peer by itself; here the peers' own mean counts, not the average of adapters that"
        " never met."
    ),
    result="alone they reached {}",
    against="against each peer alone",
    counts="peers_mean",
)
FEDAVG = Arm(
    name="fedavg",
    title="FedAvg",
    meaning="after every round all peers take the average of all, as with a server.",
    result="FedAvg {}",
    talks="with all",
)
ARMS = {arm.name: arm for arm in (DEC_LORA, DLORA, POOLED, LOCAL, FEDAVG)}


def arm_of(name: str) -> Arm:
    """The arm of that name. A name that only another version of dlora knows is its own title."""
    return ARMS.get(name) or Arm(name=name, title=name, result=f"{name} {{}}")
