"""Biases of the frozen model that each participant trains, PEFT's ``bias: all`` and ``lora_only``.

As in PEFT, a model whose biases have changed is another model even without the adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.errors import ModelError

# modules whose bias is added to the result along its last dimension
_ADDS_ITS_BIAS = (nn.Linear, nn.LayerNorm, Conv1D)


class StackedBias(nn.Module):
    """y = base(x) + b_p, where ``base`` is a frozen linear or norm whose own bias is zero.

    `StackedModel.use` binds ``bias`` (P, O).
    """

    bias: Tensor

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Any:
        """The frozen weight, for architectures that read it."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """(P x ..., I) -> (P x ..., O)."""
        result: Tensor = self.base(x)
        result_PNO = result.reshape(len(self.bias), -1, result.shape[-1])
        y_PNO = result_PNO + self.bias.to(x.device).unsqueeze(1)
        return y_PNO.view(result.shape).to(result.dtype)


def trained_biases(
    network: nn.Module,
    which: Literal["none", "all", "lora_only"],
    adapted: Collection[str],
    head: Sequence[str],
) -> list[str]:
    """The names of the parameters that ``which`` lets train, as in PEFT, without the ``head``'s.

    ``adapted``: the names of the adapted linears.
    """
    if which == "none":
        return []
    return [
        name
        for name, _ in network.named_parameters()
        if "bias" in name
        and (which == "all" or name.rpartition(".")[0] in adapted)
        and not any(name.startswith(f"{top}.") for top in head)
    ]


def stack_biases(network: nn.Module, biases: Collection[str]) -> dict[str, Tensor]:
    """Let participants train these parameters; returns the values from which they start, (O,) each.

    The modules are replaced in place, and their own biases become zero. Raises ModelError when a
    module does not add its bias to its result.
    """
    initial = {}
    for name in biases:
        module, _, attribute = name.rpartition(".")
        parent, _, child = module.rpartition(".")
        base = network.get_submodule(module)
        if attribute != "bias" or not isinstance(base, _ADDS_ITS_BIAS):
            raise ModelError(
                f"lora.bias all: {name} belongs to a {type(base).__name__}, where several peers"
                " cannot train it at once; take lora_only, or peft: {bias: all} instead of lora"
            )
        assert isinstance(base.bias, Tensor)
        initial[name] = base.bias.detach().float().cpu().clone()
        with torch.no_grad():
            base.bias.zero_()
        setattr(network.get_submodule(parent), child, StackedBias(base))
    return initial
