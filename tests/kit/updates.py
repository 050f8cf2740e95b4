"""Two updates of a weight compared, and the bounds within which they are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file

from dlora.config.run import Config
from dlora.config.training import TAKEN_OUT

ENCODERS, DECODERS = ("bert", "roberta"), ("llama", "opt", "gpt2")
SERVED = [(family, "classification") for family in ENCODERS + DECODERS] + [
    (family, "causal-lm") for family in DECODERS
]
SERVED += [(family, task) for task in ("regression", "multi-label") for family in ("bert", "gpt2")]
SERVED += [("bert", "token-classification"), ("llama", "token-classification")]
UPDATE_BOUND = {"adamw": 1e-4, "sgd": 1e-5}
LOSS_BOUND = 1e-5
# PEFT's kinds of adapter: what each changes in a config
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"lora.use_rslora": True, "lora.r": 8},
    "patterns": {"lora.rank_pattern": {"query": 2}, "lora.alpha_pattern": {"0.*.value": 2.0}},
    "dora": {"lora.use_dora": True},
    "dora-dropout": {"lora.use_dora": True, "lora.lora_dropout": 0.1},
    "gaussian": {"lora.init_lora_weights": "gaussian", "lora.r": 16},
    "biases": {"lora.bias": "all"},
    "biases-lora-only": {"lora.bias": "lora_only", "lora.target_modules": ["c_attn"]},
    "whole-modules": {"lora.modules_to_save": ["word_embeddings", "LayerNorm"]},
    "layers": {"lora.layers_to_transform": [1], "lora.exclude_modules": ["attention.output.dense"]},
    "ia3": {
        "lora": {},
        "peft": {
            "peft_type": "IA3",
            "target_modules": ["value", "output.dense"],
            "feedforward_modules": ["output.dense"],
        },
    },
    "pissa": {"lora.init_lora_weights": "pissa", "train.learning_rate": 1e-3},
}

_OF_TEXTS = transformers.AutoModelForSequenceClassification
_ORACLES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "classification": (_OF_TEXTS, "SEQ_CLS", {"num_labels": 2}),
    "regression": (_OF_TEXTS, "SEQ_CLS", {"num_labels": 1, "problem_type": "regression"}),
    "multi-label": (
        _OF_TEXTS,
        "SEQ_CLS",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "token-classification": (
        transformers.AutoModelForTokenClassification,
        "TOKEN_CLS",
        {"num_labels": 4},
    ),
    "causal-lm": (transformers.AutoModelForCausalLM, "CAUSAL_LM", {}),
}


def plain_model(config: Config) -> Any:
    """The run's model with its new head, by transformers alone."""
    factory, _, head = _ORACLES[config.task]
    dropout = {}
    if config.train.model_dropout is not None:
        known = transformers.AutoConfig.from_pretrained(config.model).to_dict()
        dropout = {
            key: config.train.model_dropout
            for key in known
            if "dropout" in key or key.endswith("pdrop")
        }
    torch.manual_seed(config.seed)
    base: Any = factory.from_pretrained(config.model, pad_token_id=0, **head, **dropout)
    for child in base.children():
        if isinstance(child, torch.nn.Dropout) and config.train.model_dropout is not None:
            child.p = config.train.model_dropout
    return base


def peft_oracle(config: Config) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The same model and the same adapter by PEFT alone, and its initial tensors."""
    base, kind = plain_model(config), _ORACLES[config.task][1]
    section = peft.LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=config.lora.lora_dropout,
        target_modules=list(config.lora.target_modules),
        exclude_modules=config.lora.exclude_modules and list(config.lora.exclude_modules),
        layers_to_transform=config.lora.layers_to_transform,
        rank_pattern=dict(config.lora.rank_pattern or {}),
        alpha_pattern=dict(config.lora.alpha_pattern or {}),
        use_rslora=config.lora.use_rslora,
        use_dora=config.lora.use_dora,
        bias=config.lora.bias,
        modules_to_save=config.lora.modules_to_save and list(config.lora.modules_to_save),
        init_lora_weights=config.lora.init_lora_weights,
        fan_in_fan_out=base.config.model_type == "gpt2",
        task_type=kind,
    )
    if config.peft is not None:
        section = peft.get_peft_config({"task_type": kind, **config.peft})
    torch.manual_seed(config.seed)
    model = peft.get_peft_model(base, section)
    return model, state_in_peft(model)


def state_in_peft(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the adapter's tensors. With bias all, PEFT lists the head's biases once more."""
    return {
        name: value.clone()
        for name, value in peft.get_peft_model_state_dict(model).items()
        if not name.endswith(("original_module.bias", "modules_to_save.bias"))
    }


# with these, a run over some rounds and one that begins with its average are one run
GOES_ON: dict[str, Any] = {
    "peers.topology": {"kind": "complete"},
    "train.optimizer": "sgd",
    "train.learning_rate": 0.1,
    "train.lr_scheduler_type": "constant",
    "train.local_steps": 1,
    "train.per_device_train_batch_size": 16,
    "eval_every": 0,
}


def update_of(config: Config, adapter: Path) -> dict[str, torch.Tensor]:
    """The update in a saved adapter."""
    _, initial = peft_oracle(config)
    final = load_file(adapter / "adapter_model.safetensors")
    assert final.keys() == initial.keys()
    if config.lora.init_lora_weights in TAKEN_OUT:  # the other half is what was taken out
        for name, tensor in initial.items():
            if final[name].shape != tensor.shape:
                final[name] = final[name][: tensor.shape[0], : tensor.shape[1]]
    return {name: final[name] - initial[name] for name in final}


def relative_difference(
    update: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], part: str
) -> float:
    """|D - D'| / |D'| over all tensors whose name holds ``part``."""
    names = [name for name in reference if part in name]
    assert names
    difference = torch.cat([(update[name] - reference[name]).flatten() for name in names]).norm()
    return float(difference / torch.cat([reference[name].flatten() for name in names]).norm())


def _without_bias_of_keys(update: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A softmax does not see the bias of the keys, so AdamW makes steps of its rounding there."""
    return {
        name: torch.cat([tensor.chunk(3)[0], tensor.chunk(3)[2]])
        if name.endswith(("c_attn.base_layer.bias", "c_attn.bias"))
        else tensor
        for name, tensor in update.items()
        if ".key." not in name or not name.endswith(".bias")
    }


def assert_same(
    update: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], bound: float, task: str
) -> None:
    parts = ["ia3_l"] if any("ia3_l" in name for name in update) else ["lora_A", "lora_B"]
    if any("magnitude" in name for name in update):
        parts.append("lora_magnitude_vector")
    parts += [
        part
        for part in ("layer.bias", "Norm.bias", "ln_1.bias", "Norm.weight", "embed")
        if any(part in name for name in update)
    ]
    update, reference = (_without_bias_of_keys(one) for one in (update, reference))
    if task != "causal-lm":
        parts.append("classifier" if any("classifier" in name for name in update) else "score")
    for part in parts:
        found = relative_difference(update, reference, part)
        assert found < bound, (part, found)


def targets(family: str) -> list[str]:
    return {
        "bert": ["query", "value", "dense"],
        "roberta": ["query", "value"],
        "llama": ["q_proj", "v_proj", "down_proj"],
        "opt": ["q_proj", "v_proj", "fc1"],
        "gpt2": ["c_attn", "c_fc"],
    }[family]
