"""What the messages of a real peer hold: names, dtypes and shapes of tensors, by message name.

All peers derive this from the run's manifest before a message is sent. Under a schedule, a round's
message holds only the tensors of the units that took part at its sender, and only the sender knows
them. They are some of the tensors that would be sent without a schedule. The length of such a
message is therefore not fixed, but has an upper bound.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dlora.decentralized.mixing import build_rule
from dlora.decentralized.peer.messages_on_disk import round_of
from dlora.run.prepare import WIRE_DTYPES, Prepared
from dlora.wire.tensors import Expected, decode_tensors, encode, held, message_num_bytes

# messages of the end of a run; always float32, because no later mixing reduces their rounding error
REDUCTION = ("sum", "average")


def expected_tensors(prepared: Prepared, message: str) -> Expected:
    """Tensor name -> dtype and shape in a message of that name if all units are active.

    Empty for a name that no peer sends.
    """
    round = round_of(message)
    shapes = {name: tuple(tensor.shape) for name, tensor in prepared.trained.items()}
    if round is not None and round < prepared.config.train.rounds:
        rule, wire = build_rule(prepared.config.peers), WIRE_DTYPES[prepared.config.peers.wire]
        return {name: (wire, shape) for name, shape in shapes.items() if rule.sends(name, round)}
    if message in REDUCTION:
        return {name: (torch.float32, shape) for name, shape in shapes.items()} | {
            "num_peers": (torch.float32, (1,))
        }
    return {}


def message_bytes(prepared: Prepared, message: str, names: Collection[str] | None = None) -> int:
    """The length of a message of that name in bytes.

    ``names``: the message holds only its tensors that are in ``names``; None: all of them.
    """
    expected = expected_tensors(prepared, message)
    return message_num_bytes(
        {name: expected[name] for name in expected if names is None or name in names}
    )


def message_sizes(prepared: Prepared, message: str) -> range:
    """The lengths in bytes that a message of that name can have; empty for a name that no peer
    sends.
    """
    if not expected_tensors(prepared, message):
        return range(0)
    longest = message_bytes(prepared, message)
    return range(1 if _leaves_out(prepared, message) else longest, longest + 1)


def encode_message(prepared: Prepared, message: str, tensors: Mapping[str, Tensor]) -> bytes:
    """Encode one participant's tensors, (1, ...) each, as that message."""
    wire = torch.float32 if message in REDUCTION else WIRE_DTYPES[prepared.config.peers.wire]
    return encode({name: tensor[0] for name, tensor in tensors.items()}, wire)


def decode_message(prepared: Prepared, message: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a message in float32, (1, ...) each.

    Raises ValueError if the file does not hold what a message of that name must, or a value is not
    finite.
    """
    expected = expected_tensors(prepared, message)
    tensors = decode_tensors(
        path, held(path, expected) if _leaves_out(prepared, message) else expected
    )
    if "num_peers" in tensors and tensors["num_peers"].item() not in range(
        1, prepared.topology.num_peers + 1
    ):
        raise ValueError(
            f"it counts {tensors['num_peers'].item():g} peers of {prepared.topology.num_peers}"
        )
    return {name: tensor.float().unsqueeze(0) for name, tensor in tensors.items()}


def _leaves_out(prepared: Prepared, message: str) -> bool:
    """Whether a message of that name may hold fewer tensors than with all units active."""
    return prepared.config.schedule.kind != "all" and round_of(message) is not None
