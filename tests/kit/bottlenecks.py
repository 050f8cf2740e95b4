"""Bottleneck adapters written out: nn.Linear and forward hooks on a plain transformers model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.run.prepare import Prepared
from dlora.seeds import derive_seed
from kit.updates import relative_difference

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
        classes = config.task == "classification"
        factory = (
            transformers.AutoModelForSequenceClassification
            if classes
            else transformers.AutoModelForCausalLM
        )
        known = transformers.AutoConfig.from_pretrained(config.model).to_dict()
        off = {key: 0.0 for key in known if "dropout" in key or key.endswith("pdrop")}
        torch.manual_seed(config.seed)
        head = {"num_labels": 2} if classes else {}
        self.model = factory.from_pretrained(config.model, pad_token_id=0, **head, **off)
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
            if classes and name.startswith(("classifier.", "score.")):
                self.trained[name] = parameter.requires_grad_()
        self.initial = {name: tensor.detach().clone() for name, tensor in self.trained.items()}

    def update(self) -> dict[str, Tensor]:
        """What training has changed."""
        return {name: tensor.detach() - self.initial[name] for name, tensor in self.trained.items()}

    def train(self, config: Config, prepared: Prepared, peer: int) -> list[float]:
        """One optimiser step a round on the rows of ``peer``; the losses."""
        train, rows = config.train, config.train.per_device_train_batch_size
        kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        parameters = list(self.trained.values())
        optimizer = kinds[train.optimizer](
            parameters, lr=train.learning_rate, weight_decay=train.weight_decay
        )
        schedule = transformers.get_scheduler(
            train.lr_scheduler_type,
            optimizer,
            num_warmup_steps=train.warmup_steps,
            num_training_steps=train.rounds,
        )
        losses = []
        self.model.train()
        for step in range(train.rounds):
            taken = prepared.streams[peer].take(step * rows, rows)
            examples = [prepared.data.peers[prepared.names[peer]][row] for row in taken]
            batch = collate(examples, prepared.pad_token_id)
            torch.manual_seed(derive_seed(config.seed, "dropout", step, "peer-0"))
            loss = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
            ).loss
            loss.backward()
            assert train.max_grad_norm is not None
            torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def _adds(down: nn.Module, act: nn.Module, up: nn.Module) -> Callable[..., Tensor]:
    def hook(layer: Any, inputs: Any, h: Tensor) -> Tensor:
        return h + up(act(down(h)))  # type: ignore[no-any-return]

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
