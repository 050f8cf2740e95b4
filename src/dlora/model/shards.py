"""Divides the frozen weights over the processes of torch.distributed, each with a part (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from dlora.errors import ModelError


def mesh_of_all(device: torch.device) -> DeviceMesh:
    """All processes of torch.distributed, which all must call this."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def shard(network: Any, mesh: DeviceMesh) -> None:
    """Keep this process's part of each weight of a model that is whole on the CPU, and move it to
    the device of ``mesh``.

    A forward or backward pass gathers the weights of one block, uses them and drops them. All
    processes must make it together, each on rows of its own. Raises ModelError if the model has no
    blocks.
    """
    blocks = [
        block
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and not _within_a_list(network, name)
        for block in module
    ]
    if not blocks:
        raise ModelError(
            f"shard_model: {type(network).__name__} has no list of blocks (nn.ModuleList), of which"
            " each is gathered by itself; set shard_model to false"
        )
    # A backward pass reaches every block in every process, whatever each process trains.
    body = network.body if hasattr(network, "body") else network
    body.enable_input_require_grads()
    for part in (*blocks, network):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def _within_a_list(network: nn.Module, name: str) -> bool:
    """Whether a module is part of a block, as the list of a block's experts is."""
    above = name.split(".")[:-1]
    return any(
        isinstance(network.get_submodule(".".join(above[:end])), nn.ModuleList)
        for end in range(1, len(above) + 1)
    )
