"""Whether a message that came is what its name says, and whether it can be believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dlora.decentralized.peer.belief import Belief
from dlora.decentralized.peer.messages import TensorMessages
from dlora.decentralized.peer.messages_on_disk import round_of
from dlora.lora.factors import Factors


@dataclass(frozen=True)
class Check:
    """The check of `Exchange` for messages of tensors.

    ``own``: this peer's factors now. ``standing``: the same, without what a schedule has dropped;
    sums and averages are made of these.
    """

    messages: TensorMessages
    belief: Belief
    own: Callable[[], Factors]
    standing: Callable[[], Factors]

    def __call__(self, neighbour: str, message: str, path: Path) -> None:
        """Raise ValueError if a neighbour's message is not what its name says, Implausible if it
        cannot be believed.
        """
        came = self.messages.decode(message, path)
        num_peers = came.pop("num_peers", None)
        own = self.own() if num_peers is None else self.standing()
        parts = num_peers.item() if num_peers is not None and message == "sum" else 1.0
        round = round_of(message)
        self.belief.judge(
            neighbour,
            self.messages.rounds if round is None else round,
            own,
            came if parts == 1.0 else {name: tensor / parts for name, tensor in came.items()},
        )
