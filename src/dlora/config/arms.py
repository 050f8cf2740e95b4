"""The arms of a comparison: who talks to whom, whose data lie together, which score counts."""

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
    result: str = ""  # a part of the page's first sentence; {} is the figure that counts
    against: str = ""  # what the main arm's difference from this one is called
    talks: Literal["as configured", "with all", "with nobody"] = "with nobody"
    pooled: bool = False  # all data belong to one participant
    # the average's score, or the mean of the peers' own
    counts: Literal["consensus", "peers_mean"] = "consensus"
    # plain LoRA: neither a schedule nor the configured rule, and its adapters are not written
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
    """The arm of that name; one that only another version knows is shown as what its log says."""
    return ARMS.get(name) or Arm(name=name, title=name, result=f"{name} {{}}")
