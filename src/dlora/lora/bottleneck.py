"""Bottleneck adapters: where they stand in a model, and how they are attached."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dlora.config.bottleneck import BottleneckSection
from dlora.config.tasks import TASKS
from dlora.config.training import LoraSection
from dlora.errors import ModelError
from dlora.lora.factors import Factors
from dlora.lora.layers import Bottleneck, StackedBottleneck, replace, stack_head
from dlora.lora.stacked import StackedModel
from dlora.lora.targets import find_targets, linear_names
from dlora.model.layers import block_linears
from dlora.model.load import FrozenModel

# The ends of the names that architectures of transformers give the linear that ends attention.
_ATTENTION = (
    *("attention.output.dense", "crossattention.output.dense", "attention.dense"),
    *("self_attention.dense", "self_attn.dense", "attention.out_lin", "attention.attn.o"),
    *("attn.c_proj", "crossattention.c_proj", "attention.out_proj", "attn.out_proj"),
    *("self_attn.out_proj", "encoder_attn.out_proj", "o_proj", "attn.Wo"),
    *("SelfAttention.o", "EncDecAttention.o"),
)
# The same for the feed-forward network.
_FEED_FORWARD = (
    *("output.dense", "mlp.c_proj", "mlp.dense_4h_to_h", "down_proj", "fc2", "fc_out", "ffn.lin2"),
    *("ffn_output", "mlp.Wo", "DenseReluDense.wo"),
)


def attach_bottleneck(
    frozen: FrozenModel, section: BottleneckSection, task: str, seed: int
) -> StackedModel:
    """Put a stacked bottleneck after each target; returns the model with the values at which all
    begin.

    The weight of down is drawn on the CPU from ``seed`` as torch draws a linear's; the biases and
    up are zero, so that the model begins unchanged (AdapterHub's init_weights "mam_adapter"; He et
    al., arXiv 2110.04366, section 4.1). The network is changed in place. Raises ModelError when a
    target matches nothing or no linear.
    """
    network = frozen.network
    targets = find_outputs(network, section, frozen.head)
    initial: Factors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in targets:
            layer: Any = network.get_submodule(name)
            # GPT-2's Conv1D has another name for it
            width = int(layer.out_features if isinstance(layer, nn.Linear) else layer.nf)
            down = nn.init.kaiming_uniform_(torch.empty(section.r, width), a=math.sqrt(5))
            initial[f"{name}.down_weight"] = down
            initial[f"{name}.down_bias"] = torch.zeros(section.r)
            initial[f"{name}.up_weight"] = torch.zeros(width, section.r)
            initial[f"{name}.up_bias"] = torch.zeros(width)
            replace(network, name, StackedBottleneck(layer, section.activation))
    head_factors, head_rest = stack_head(network, frozen.head)
    return StackedModel(
        network=network,
        task=TASKS[task],
        initial=initial | head_factors,
        frozen_head=frozenset() if section.train_head else frozenset(head_factors),
        peft_config=None,
        head_rest=head_rest,
        bottleneck=Bottleneck(frozen.source, task, section.r, section.activation, tuple(targets)),
    )


def find_outputs(network: Any, section: BottleneckSection, head: tuple[str, ...]) -> list[str]:
    """The full names of the linears that ``bottleneck.target_modules`` names, in the network's
    order.

    The words ``output-projections`` and ``feed-forward`` look for names that architectures use. The
    linears of single experts are left out, because their sum is what the feed-forward adds. Raises
    ModelError when a target matches nothing or no linear.
    """
    wanted = section.target_modules
    if wanted not in ("output-projections", "feed-forward"):
        assert not isinstance(wanted, str) or wanted != "all-linear"
        try:
            return find_targets(network, LoraSection(target_modules=wanted), head)
        except ModelError as error:  # names of this block and not of the other
            raise ModelError(str(error).replace("lora.", "bottleneck.")) from error
    found = [
        name
        for name in block_linears(network)
        if "expert" not in name
        and (
            _ends(name, _ATTENTION)
            if _ends(name, _ATTENTION) and wanted == "output-projections"
            else _ends(name, _FEED_FORWARD) and not _ends(name, _ATTENTION)
        )
    ]
    if not found:
        raise ModelError(
            f"bottleneck.target_modules {wanted}: the blocks of {type(network).__name__} have none"
            f" that dlora knows by its name; name them; the linears here are"
            f" {linear_names(network)}"
        )
    return found


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return f".{name}".endswith(tuple(f".{end}" for end in ends))
