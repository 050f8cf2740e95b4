"""Where tensors wait that do not fit into memory: in files that are mapped into it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dlora.files import cannot_write


def mapped_zeros(folder: Path, shape: Sequence[int]) -> Tensor:
    """Float32 zeros of this shape in a file of ``folder``.

    The kernel writes what nobody uses to the disk and reads it when it is used again. The file has
    no name, so it is gone with its tensor, also after kill -9. All of its room is taken now: if the
    disk were full later, the kernel would end the process. Raises RunError if there is no room.
    """
    count = math.prod(shape)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, count * torch.float32.itemsize)
            place = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(place, shared=True, size=count, dtype=torch.float32).view(*shape)
    except OSError as error:
        raise cannot_write(folder, error) from error
