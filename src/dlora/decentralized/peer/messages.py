"""Which messages a run has, by name: their tensors, their dtypes and shapes, and their bytes.

All peers derive this from what they agreed on before a message is sent. Under a schedule, a round's
message holds only the tensors of the units that took part at its sender, and only the sender knows
them. They are some of the tensors that would be sent without a schedule. The length of such a
message is therefore not fixed, but has an upper bound.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dlora.decentralized.mixing import Rule
from dlora.decentralized.peer.messages_on_disk import round_of
from dlora.wire.tensors import (
    Expected,
    check_finite,
    decode_tensors,
    encode,
    held,
    message_num_bytes,
)

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# messages of the end of a run; always float32, because no later mixing reduces their rounding error
REDUCTION = ("sum", "average")


class Messages(Protocol):
    """How one peer's tensors, (1, ...) each, become the messages of a run."""

    def sizes(self, message: str) -> range:
        """The lengths in bytes that a message of that name can have.

        Empty for a name that no peer sends.
        """

    def encode(self, message: str, tensors: Mapping[str, Tensor]) -> bytes:
        """The bytes of that message. Raises ValueError if a value on the wire is not finite."""

    def decode(self, message: str, path: Path) -> Mapping[str, Tensor]:
        """The tensors of a message.

        Raises ValueError if the file does not hold what a message of that name must.
        """


@dataclass(frozen=True, kw_only=True)
class TensorMessages:
    """The messages of a run whose peers train tensors of these ``shapes`` by name.

    ``wire``: the dtype of a round's message. ``leaves_out``: a round's message may hold fewer
    tensors than the rule sends.
    """

    shapes: Mapping[str, tuple[int, ...]]
    rule: Rule
    wire: torch.dtype
    rounds: int
    num_peers: int
    leaves_out: bool = False

    def expected(self, message: str) -> Expected:
        """Tensor name -> dtype and shape in a message of that name if nothing is left out.

        Empty for a name that no peer sends.
        """
        round = round_of(message)
        if round is not None and round < self.rounds:
            return {
                name: (self.wire, shape)
                for name, shape in self.shapes.items()
                if self.rule.sends(name, round)
            }
        if message in REDUCTION:
            return {name: (torch.float32, shape) for name, shape in self.shapes.items()} | {
                "num_peers": (torch.float32, (1,))
            }
        return {}

    def num_bytes(self, message: str, names: Collection[str] | None = None) -> int:
        """The length of a message of that name in bytes.

        ``names``: the message holds only its tensors that are in ``names``; None: all of them.
        """
        expected = self.expected(message)
        return message_num_bytes(
            {name: expected[name] for name in expected if names is None or name in names}
        )

    def sizes(self, message: str) -> range:
        """See `Messages.sizes`."""
        if not self.expected(message):
            return range(0)
        longest = self.num_bytes(message)
        return range(1 if self._may_leave_out(message) else longest, longest + 1)

    def encode(self, message: str, tensors: Mapping[str, Tensor]) -> bytes:
        """See `Messages.encode`."""
        wire = torch.float32 if message in REDUCTION else self.wire
        sent = {name: tensor[0].to(wire) for name, tensor in tensors.items()}
        for name, tensor in sent.items():
            check_finite(name, tensor)
        return encode(sent, wire)

    def decode(self, message: str, path: Path) -> dict[str, Tensor]:
        """The tensors of a message in float32.

        Raises ValueError if the file does not hold what a message of that name must, or a value is
        not finite.
        """
        expected = self.expected(message)
        tensors = decode_tensors(
            path, held(path, expected) if self._may_leave_out(message) else expected
        )
        counted = tensors.get("num_peers")
        if counted is not None and counted.item() not in range(1, self.num_peers + 1):
            raise ValueError(f"it counts {counted.item():g} peers of {self.num_peers}")
        return {name: tensor.float().unsqueeze(0) for name, tensor in tensors.items()}

    def _may_leave_out(self, message: str) -> bool:
        return self.leaves_out and round_of(message) is not None
