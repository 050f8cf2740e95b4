"""The config of a training script that takes part as a peer: with whom it mixes, and how."""

from __future__ import annotations

from pydantic import Field, model_validator

from dlora.config.peers import PeersSection
from dlora.config.reading import Document, Text


class PeersFile(PeersSection, Document):
    """peers.yaml, the same file at every site. `members` and `rounds` must be given."""

    rounds: int = Field(ge=1, description="how often a peer mixes until the run ends")
    state_dir: Text = Field(
        "dlora-state",
        description=(
            "the folder in which each peer keeps messages, decisions and its log, in a folder with"
            " the peer's name"
        ),
    )

    @model_validator(mode="after")
    def _for_a_script(self) -> PeersFile:
        if self.members is None:
            raise ValueError("members is missing; name those who take part")
        for key in ("count", "group_size"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} belongs to a simulation; remove it")
        if self.participation < 1:
            raise ValueError("participation below 1 belongs to a simulation; remove it")
        return self
