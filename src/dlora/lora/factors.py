"""What is computed from the factors (A, B) of an adapter: average, distance, product, hash.

Shape letters: P participants, R rank, I in, O out. ``Factors`` maps a name to one tensor for all
participants, and its first dimension is the participant: ``<module>.lora_A`` (P, R, I) and
``<module>.lora_B`` (P, O, R), with DoRA ``<module>.lora_magnitude_vector`` (P, O) too, or under
placement core only ``<module>.lora_M`` (P, R, R). A bottleneck adapter has ``<module>.down_weight``
(P, R, O), ``down_bias`` (P, R), ``up_weight`` (P, O, R) and ``up_bias`` (P, O). A trained head has
``<module>.weight`` (P, O, I) and ``<module>.bias`` (P, O).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Factors = dict[str, Tensor]
BOTTLENECK = ("down_weight", "down_bias", "up_weight", "up_bias")
_OF_ADAPTERS = ("lora_A", "lora_B", "lora_M", "lora_magnitude_vector", *BOTTLENECK)
# While these are zero, the adapter of a module adds nothing.
_ADDING = (".lora_B", ".lora_M", ".up_weight", ".up_bias")
# one for each adapted module
_ONE_A_MODULE = (".lora_A", ".lora_M", ".down_weight")
Zeros = Callable[[Sequence[int]], Tensor]  # makes a tensor of this shape

# numbers whose distance to the mean is computed at once: 64 MiB
_PIECE = 1 << 24


def stack(
    initial: Mapping[str, Tensor],
    num_participants: int,
    device: torch.device | str = "cpu",
    zeros: Zeros | None = None,
) -> Factors:
    """Copy the initial values for every participant: (...) -> (P, ...).

    The copies do not share memory. ``zeros`` makes the tensors; None: they are in memory.
    """
    if zeros is not None:
        return {
            name: zeros((num_participants, *tensor.shape)).copy_(tensor)
            for name, tensor in initial.items()
        }
    return {
        name: tensor.to(device)
        .expand(num_participants, *tensor.shape)
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in initial.items()
    }


def one(factors: Mapping[str, Tensor], participant: int) -> Factors:
    """A view of one participant's factors, still stacked: (1, ...)."""
    return {name: tensor[participant : participant + 1] for name, tensor in factors.items()}


def average(factors: Mapping[str, Tensor]) -> Factors:
    """The mean over participants, still stacked: (1, ...). Dec-LoRA evaluates it (Algorithm 1)."""
    return {name: tensor.mean(dim=0, keepdim=True) for name, tensor in factors.items()}


def consensus_distance(
    factors: Mapping[str, Tensor], mean: Mapping[str, Tensor] | None = None
) -> float:
    """Mean over participants of the squared distance to their mean, summed over all tensors.

    ``mean``: (1, ...) each, if there are more participants than these; None: of these.
    """
    total = torch.zeros((), dtype=torch.float64)
    for name, tensor in factors.items():
        middle = tensor.mean(dim=0, keepdim=True) if mean is None else mean[name]
        for rows in tensor.split(max(1, _PIECE // tensor[0].numel())):
            total += (rows - middle).square().sum().double().cpu() / tensor.shape[0]
    return total.item()


def product(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """delta_weight = scaling x B A: (P, R, I), (P, O, R) -> (P, O, I)."""
    return scaling * torch.bmm(lora_B, lora_A)


def num_parameters(factors: Mapping[str, Tensor]) -> int:
    """How many numbers one participant trains."""
    return sum(tensor[0].numel() for tensor in factors.values())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the tensors, sorted by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return sha.hexdigest()


def target_ranks(initial: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of each adapted module by its dotted name, sorted by name."""
    return {
        name.rpartition(".")[0]: len(tensor)
        for name, tensor in sorted(initial.items())
        if name.endswith(_ONE_A_MODULE)
    }


def adds(name: str) -> bool:
    """Whether the tensor of this name is one that makes its adapter add nothing while it is zero:
    B, a core M, or the up of a bottleneck.
    """
    return name.endswith(_ADDING)


def of_module(module: str) -> list[str]:
    """The names that the tensors of a module's adapter can have, from its input to its output."""
    return [f"{module}.{kind}" for kind in _OF_ADAPTERS]


def is_head(name: str) -> bool:
    """Whether the tensor of this name belongs to a head and not to an adapted module."""
    return name.rpartition(".")[2] not in _OF_ADAPTERS
