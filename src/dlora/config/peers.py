"""The config block peers: who takes part, who exchanges with whom, and how factors are mixed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dlora.config.names import why_unsafe
from dlora.config.reading import Section, Text


class TopologySection(Section):
    """Which peers are neighbours."""

    kind: Literal[
        "ring", "complete", "erdos-renyi", "exponential", "hypercube", "base-k", "edges"
    ] = Field("ring", description="the graph of neighbours; `dlora topology KIND` shows it")
    p: float | None = Field(None, gt=0, le=1, description="erdos-renyi: probability of an edge")
    seed: int | None = Field(
        None,
        ge=0,
        description="erdos-renyi: seeds from this one on are tried until the graph is connected"
        " (default 0)",
    )
    k: int | None = Field(None, ge=1, description="base-k: most neighbours in a round (default 1)")
    edges: tuple[tuple[Text | int, Text | int], ...] | None = Field(
        None, description="edges: pairs of peers, by name or index"
    )

    @model_validator(mode="after")
    def _needs(self) -> TopologySection:
        for key, kind in {
            "p": "erdos-renyi",
            "seed": "erdos-renyi",
            "k": "base-k",
            "edges": "edges",
        }.items():
            if getattr(self, key) is not None and self.kind != kind:
                raise ValueError(f"{key} belongs to kind {kind}, not to {self.kind}; remove it")
            if getattr(self, key) is None and self.kind == kind and key in ("p", "edges"):
                raise ValueError(f"kind {kind} needs {key}")
        return self


class PeersSection(Section):
    """The participants, and how they mix their factors."""

    count: int | None = Field(
        None,
        ge=1,
        description=(
            "number of peers; iid and dirichlet need it; null: the number of shares, sizes, files"
            " or column values"
        ),
    )
    topology: TopologySection = TopologySection()
    weights: Literal["metropolis", "laplacian"] | None = Field(
        None,
        description=(
            "mixing weights; null: metropolis, or the weights that the topology fixes; laplacian:"
            " the paper's I - 2L/(3 lambda_max)"
        ),
    )
    rule: Literal["factor", "ffa", "alternate"] = Field(
        "factor",
        description=(
            "factor: A and B train and are mixed, as in the paper; ffa: A is frozen; alternate: one"
            " factor trains, both are mixed"
        ),
    )
    period: int = Field(
        5, ge=1, description="rule alternate: rounds after which the other factor trains"
    )
    wire: Literal["float32", "bfloat16"] = Field("float32", description="dtype of sent factors")
    overlap: bool = Field(
        False,
        description=(
            "true: the exchange runs while the next local steps do, and what mixing changes is"
            " added one round later; for slow links"
        ),
    )
    participation: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "the part of the peers that the seed draws for a round, at least one peer; the others"
            " neither train nor mix"
        ),
    )
    members: tuple[Text, ...] | None = Field(
        None, description="names instead of a count: who takes part (`dlora peer`)"
    )
    silence_s: float = Field(
        60,
        gt=0,
        description="a neighbour from which nothing comes for so long is left out of the round",
    )
    round_limit_s: float = Field(
        3600, gt=0, description="the longest a round waits for a neighbour, whatever still comes"
    )
    catch_up_after: int = Field(
        10, ge=1, description="rounds behind its neighbours after which a peer takes their state"
    )
    group_size: int | None = Field(
        None,
        ge=1,
        description=(
            "participants in one forward pass; null: as many as fit into memory, but 1 if the model"
            " would mix their rows"
        ),
    )

    @model_validator(mode="after")
    def _who(self) -> PeersSection:
        if self.members is not None and self.count is not None:
            raise ValueError("members and count are two ways to say who takes part; keep one")
        twice = sorted(
            {name for name in self.members or () if (self.members or ()).count(name) > 1}
        )
        if twice:
            raise ValueError(f"members names {twice[0]} twice; name each peer once")
        if self.members is not None and not self.members:
            raise ValueError("members names nobody; name those who take part, or remove it")
        if wrong := why_unsafe(self.members or ()):
            raise ValueError(f"members: {wrong}")
        return self
