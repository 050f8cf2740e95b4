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
    from dlora.run import real_peer
    from dlora.run.messages import encode_message as honest

    def encode(prepared: Any, message: str, tensors: Mapping[str, Tensor]) -> bytes:
        if round_of(message) not in rounds:
            return honest(prepared, message, tensors)
        lies = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in lies.values():
            (tensor.flatten()[:1] if value == "1e30" else tensor).fill_(float(value))
        return honest(prepared, message, lies)

    setattr(real_peer, "encode_message", encode)  # noqa: B010  # its importers may not name it
    processes.run_dlora(arguments, out, err)
