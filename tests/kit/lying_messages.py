"""Members that lie: `dlora` with a right key and messages of its own, as processes like any
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dlora.decentralized.peer.messages_on_disk import round_of
from kit import processes


def lie(arguments: Sequence[str], out: Path, err: Path, value: str, *rounds: int) -> None:
    """Take part, but the messages of ``rounds`` hold ``value`` in one number of each tensor (1e30)
    or in all (1e3).
    """
    from dlora.decentralized.peer.messages import TensorMessages

    honest = TensorMessages.encode

    def encode(self: Any, message: str, tensors: Mapping[str, Tensor]) -> bytes:
        if round_of(message) not in rounds:
            return honest(self, message, tensors)
        lies = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in lies.values():
            (tensor.flatten()[:1] if value == "1e30" else tensor).fill_(float(value))
        return honest(self, message, lies)

    TensorMessages.encode = encode  # type: ignore[method-assign]
    processes.run_dlora(arguments, out, err)
