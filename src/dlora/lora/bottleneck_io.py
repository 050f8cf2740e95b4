"""The folder of a bottleneck adapter: its tensors, what they are, and how to load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save
from torch import Tensor

from dlora.errors import ModelError
from dlora.files import write_atomically
from dlora.lora.layers import Bottleneck
from dlora.lora.model_card import base_text, factory_text, how_to_load
from dlora.lora.stacked import StackedModel
from dlora.version import __version__

WEIGHTS = "bottleneck.safetensors"  # named as the factors are; a head's as in the model
FACTS = "bottleneck.json"  # the fields of `Bottleneck`

# The code for people; a test runs it.
_LOAD = """\
import json
import pathlib
import torch
import transformers
from safetensors.torch import load_file

facts = json.loads(pathlib.Path(folder, "bottleneck.json").read_text())
tensors = load_file(pathlib.Path(folder, "bottleneck.safetensors"))
activation = getattr(torch.nn.functional, facts["activation"])
model = {factory}

def add_bottleneck(name):
    parts = ("down_weight", "down_bias", "up_weight", "up_bias")
    down, down_bias, up, up_bias = (tensors.pop(f"{{name}}.{{part}}") for part in parts)

    def hook(layer, inputs, h):
        return h + activation(h @ down.T + down_bias) @ up.T + up_bias

    model.get_submodule(name).register_forward_hook(hook)

for name in facts["modules"]:
    add_bottleneck(name)
model.load_state_dict(tensors, strict=False)  # the rest is the trained head
"""


def write_bottleneck(
    folder: Path, factors: Mapping[str, Tensor], model: StackedModel, tokenizer: Any
) -> None:
    """Write one participant's factors, (1, ...) each and on the CPU, with what `load_adapter` and
    other programs must know of them. Raises OSError when the folder cannot be written.
    """
    assert model.bottleneck is not None
    weights = {name: tensor[0].contiguous() for name, tensor in factors.items()}
    facts = {"kind": "bottleneck", **asdict(model.bottleneck), "dlora": __version__}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, save(weights | model.head_rest, metadata={"format": "pt"}))
    write_atomically(folder / FACTS, json.dumps(facts, indent=2) + "\n")
    write_atomically(folder / "README.md", _card(model, model.bottleneck))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def check_bottleneck_folder(folder: Path, here: Bottleneck) -> None:
    """Raise ModelError if the folder holds no bottleneck adapter, or one of another form."""
    try:
        facts = json.loads((folder / FACTS).read_text())
        stored = {key: facts[key] for key in ("r", "activation", "modules")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"bottleneck.adapter: {folder} is no folder with a bottleneck adapter of dlora"
            f" ({FACTS} and {WEIGHTS})"
        ) from error
    for key, before in stored.items():
        now = list(here.modules) if key == "modules" else getattr(here, key)
        if before != now:
            raise ModelError(
                f"bottleneck.adapter: {folder} has {key} {before}, and here it is {now}; both must"
                " be the same"
            )


def _card(model: StackedModel, facts: Bottleneck) -> str:
    """The text of README.md, with the header of the hub."""
    base, on_hub = base_text(facts.base_model)
    head = {**on_hub, "tags": ["bottleneck-adapter", "dlora"]}
    how = how_to_load(model, base, _LOAD.format(factory=factory_text(model)))
    blocks = [name.split(".") for name in facts.modules]
    linears = ", ".join(sorted({".".join(parts[-2:]) for parts in blocks}))
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# A bottleneck adapter for {base}\n\n"
        f"Width {facts.r}, {facts.activation}, after {linears}. Written by dlora {__version__}.\n\n"
        f"{how}\n"
    )
