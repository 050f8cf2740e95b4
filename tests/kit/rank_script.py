"""One process of a site with two, for torchrun: DDP or FSDP2, plain SGD, mixing every step."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dlora


def say(line: str) -> None:
    """Write a line at once, so that it is not mixed with one of another rank."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(kind: str, rounds: int) -> None:
    """Train a small model; print what the site ends with."""
    dist.init_process_group("gloo")
    rank, index = dist.get_rank(), int(os.environ["DLORA_INDEX"])
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    bare[0].bias.requires_grad_(False)
    model: nn.Module = bare
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(bare)
    else:
        fully_shard(bare, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    peer = dlora.Peer()
    with peer.joined(model):
        for round in range(rounds):
            drawn = torch.Generator().manual_seed(100 * index + 10 * round + rank)
            x, y = torch.randn(5, 6, generator=drawn), torch.randn(5, 2, generator=drawn)
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            mixed = peer.mix()
            assert mixed is not None and mixed.round == round and len(mixed.neighbours) == 1
        average = peer.average()
        for name, value in average.items():
            say(f"average {rank} {name}={value.double().sum().item():.9f}")
        for name, parameter in bare.named_parameters():
            whole: Any = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            say(f"own {rank} {name}={whole.detach().double().sum().item():.9f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
