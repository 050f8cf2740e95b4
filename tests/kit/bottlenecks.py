"""Bottleneck adapters written out: nn.Linear and forward hooks on a plain transformers model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dlora.config.run import Config
from dlora.run.prepare import Prepared
from kit.plain_loop import plain_loop
from kit.updates import plain_model, relative_difference

# what `output-projections` means, by hand: (two blocks, the names in each)
OUTPUTS = {
    "bert": ("bert.encoder.layer", ["attention.output.dense", "output.dense"]),
    "roberta": ("roberta.encoder.layer", ["attention.output.dense", "output.dense"]),
    "llama": ("model.layers", ["self_attn.o_proj", "mlp.down_proj"]),
    "opt": ("model.decoder.layers", ["self_attn.out_proj", "fc2"]),
    "gpt2": ("transformer.h", ["attn.c_proj", "mlp.c_proj"]),
}
PARTS = ("down_weight", "down_bias", "up_weight", "up_bias")
BOTTLENECK: dict[str, Any] = {"lora": {}, "bottleneck": {"r": 4}}  # keys of `make_config`


def outputs(family: str) -> list[str]:
    """Full names, bottom to top."""
    blocks, names = OUTPUTS[family]
    return [f"{blocks}.{number}.{name}" for number in range(2) for name in names]


class Hooked:
    """A frozen transformers model, two nn.Linear for each name, and the trained head."""

    def __init__(self, config: Config, names: list[str]) -> None:
        assert config.bottleneck is not None
        self.model = plain_model(config)
        self.model.requires_grad_(False)
        self.trained: dict[str, Tensor] = {}
        act = {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU()}
        self.model.bottlenecks = nn.ModuleList()  # so that its parameters are the model's
        torch.manual_seed(config.seed)
        for name in names:
            layer = self.model.get_submodule(name)
            width = layer.weight.shape[1 if self.model.config.model_type == "gpt2" else 0]
            down = nn.utils.skip_init(nn.Linear, width, config.bottleneck.r)
            up = nn.utils.skip_init(nn.Linear, config.bottleneck.r, width)
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            for zero in (down.bias, up.weight, up.bias):
                nn.init.zeros_(zero)
            values = (down.weight, down.bias, up.weight, up.bias)
            self.trained |= {f"{name}.{part}": v for part, v in zip(PARTS, values, strict=True)}
            self.model.bottlenecks.extend([down, up])
            layer.register_forward_hook(_adds(down, act[config.bottleneck.activation], up))
        for name, parameter in self.model.named_parameters():
            if name.startswith(("classifier.", "score.")):
                self.trained[name] = parameter.requires_grad_()
        self.initial = {name: tensor.detach().clone() for name, tensor in self.trained.items()}

    def update(self) -> dict[str, Tensor]:
        """What training has changed."""
        return {name: tensor.detach() - self.initial[name] for name, tensor in self.trained.items()}

    def train(self, config: Config, prepared: Prepared, peer: int) -> list[float]:
        """One optimiser step a round on the rows of ``peer``; the losses."""
        return plain_loop(config, prepared, [peer], self.model, list(self.trained.values()))


def _adds(down: nn.Module, act: nn.Module, up: nn.Module) -> Callable[..., Tensor]:
    def hook(layer: Any, inputs: Any, h: Tensor) -> Tensor:
        changed: Tensor = h + up(act(down(h)))
        return changed

    return hook


def update_in(folder: Path, hooked: Hooked) -> dict[str, Tensor]:
    """The update in a saved adapter."""
    final = load_file(folder / "bottleneck.safetensors")
    assert final.keys() == hooked.initial.keys()
    return {name: final[name] - hooked.initial[name] for name in final}


def assert_same(one: dict[str, Tensor], reference: dict[str, Tensor], bound: float) -> None:
    """Weights, biases and the head, each by itself."""
    heads = sorted({name.partition(".")[0] for name in reference if not name.endswith(PARTS)})
    for part in (*PARTS, *heads):
        found = relative_difference(one, reference, part)
        assert found < bound, (part, found)
