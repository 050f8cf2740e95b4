"""Facts about a model's layers: linears of its blocks, dropout, the most tokens it accepts."""

from __future__ import annotations

from typing import Any

import dlora.model.quiet  # noqa: F401  # before transformers is imported

# isort: split
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# bitsandbytes' layers are nn.Linear too; Conv1D is GPT-2's transposed linear
LINEAR = (nn.Linear, Conv1D)


def block_linears(network: nn.Module) -> list[str]:
    """Names of the linears of the transformer blocks, that is, of those within an nn.ModuleList."""
    lists = block_lists(network)
    return [
        name
        for name, module in network.named_modules()
        if is_linear(module) and name.startswith(lists)
    ]


def block_lists(network: nn.Module) -> tuple[str, ...]:
    """The prefixes of the names of all modules within an nn.ModuleList."""
    return tuple(
        f"{name}." for name, module in network.named_modules() if isinstance(module, nn.ModuleList)
    )


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies each token by its weight and does nothing else.

    Some routers of experts are subclasses of nn.Linear that do more; for them this is False.
    """
    if not isinstance(module, LINEAR):
        return False
    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or not kind.__module__.startswith(
        "transformers.models."
    ):
        return True
    token = torch.zeros(
        1, 1, module.in_features, dtype=module.weight.dtype, device=module.weight.device
    )
    try:
        mapped = module(token)
    except (RuntimeError, ValueError, IndexError):
        return False
    return isinstance(mapped, Tensor) and mapped.shape == (1, 1, module.out_features)


def max_tokens(network: nn.Module) -> int | None:
    """The most tokens that a text may have: the number of learned positions.

    None if the model computes its positions.
    """
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in (
            "position_embeddings",
            "embed_positions",
            "wpe",
        ) and isinstance(module, nn.Embedding):
            # Positions that are not used: OPT has an offset, RoBERTa a padding position.
            skipped = (
                getattr(module, "offset", 0)
                if module.padding_idx is None
                else module.padding_idx + 1
            )
            return module.num_embeddings - int(skipped)
    return None


def has_dropout(model_config: Any) -> bool:
    """Whether a forward pass in training draws random numbers, by the model's configuration."""
    return any(getattr(model_config, key) for key in dropout_keys(model_config))


def dropout_keys(model_config: Any) -> list[str]:
    """The configuration's keys for dropout rates; each architecture has its own names for them."""
    return [
        key
        for key, value in model_config.to_dict().items()
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        and ("dropout" in key or key.endswith(("pdrop", "layerdrop")))
    ]
