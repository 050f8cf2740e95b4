"""The README.md of an adapter folder: what it holds, how to load it, and whether vLLM does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from dlora.lora.layers import StackedCore, StackedLora
from dlora.lora.stacked import StackedModel
from dlora.version import __version__

# what --max-lora-rank takes: MaxLoRARanks in vllm/config/lora.py
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def model_card(model: StackedModel, config: Any) -> str:
    """The text of README.md, with the header of the hub.

    ``config``: the PEFT config in the folder.
    """
    base, on_hub = base_text(str(config.base_model_name_or_path))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    facts = {**on_hub, "library_name": "peft", "tags": [kind.lower(), "dlora"]}
    how = how_to_load(
        model,
        base,
        f"import peft\nimport transformers\n\nmodel = {factory_text(model)}\n"
        "model = peft.PeftModel.from_pretrained(model, folder)\n",
    )
    serves = "vLLM does not load this folder: it serves LoRA only."
    if kind != "LORA":
        title, body = f"An adapter ({kind})", ""
    elif not any(".lora_" in name for name in model.initial):
        title, body = (
            "Trained biases",
            "All biases of the model, and no adapter (BitFit): the LoRA of rank 1 in the file adds"
            " nothing, and is there because PEFT loads biases only with one. ",
        )
    else:
        linears = {name.rpartition(".")[2] for name in config.target_modules or ()}
        title, body, serves = (
            "A LoRA adapter",
            f"Rank {config.r}, `lora_alpha` {config.lora_alpha}, on {', '.join(sorted(linears))}. ",
            _in_vllm(model, config),
        )
    return (
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n# {title} for {base}\n\n"
        f"{body}Written by dlora {__version__}.\n\n{how}\n\n{serves}\n"
    )


def base_text(source: str) -> tuple[str, dict[str, str]]:
    """How people are told the base model, and what the hub is told of it.

    Of a local folder that is the end of its path and not all of it, and nothing for the hub, which
    takes a name for one of its own models.
    """
    if not Path(source).is_dir():
        return source, {"base_model": source}
    # the last part alone is often "model"
    return "/".join(Path(source).resolve().parts[-2:]), {}


def factory_text(model: StackedModel) -> str:
    """The Python that makes the plain base model."""
    labels = f", num_labels={model.network.config.num_labels}" if model.task.has_head else ""
    return f"transformers.{model.task.model}.from_pretrained(base{labels})"


def how_to_load(model: StackedModel, base: str, code: str) -> str:
    """What to type to load a folder: the ``code``, where transformers has a class for the model."""
    if _reads_the_mean(model):
        return "The head reads the mean over the tokens: load it with `dlora eval`."
    return f"`base` is the model {base}, `folder` is this folder:\n\n```python\n{code}```"


def _reads_the_mean(model: StackedModel) -> bool:
    """Whether this is a `MeanPooledClassifier`."""
    return getattr(model.network, "base_model_prefix", "") == "body"


def _in_vllm(model: StackedModel, config: Any) -> str:
    """Whether vLLM loads the folder, and why not, as vLLM's own checks say.

    They are in vllm/lora/peft_helper.py (`validate_legal`), vllm/lora/lora_weights.py
    (`from_config`, which scales) and vllm/config/lora.py; docs/runs.md lists them field by field.
    """
    if _reads_the_mean(model):
        return "vLLM does not load this folder: it has no classifier that reads the mean."
    reasons = []
    if config.modules_to_save:
        reasons.append(f"it refuses `modules_to_save`, here {', '.join(config.modules_to_save)}")
    if config.use_dora:
        reasons.append("it refuses DoRA (`use_dora`)")
    if config.bias != "none":
        reasons.append("it refuses trained biases (`bias`)")
    most = max([config.r, *config.rank_pattern.values()])
    room = next((rank for rank in _VLLM_RANKS if rank >= most), None)
    if room is None:
        twice = " (twice that of the run, after PiSSA or OLoRA)" if model.taken_out else ""
        reasons.append(f"it takes a rank of {_VLLM_RANKS[-1]} at most, this one is {most}{twice}")
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    layers = [one for one in model.network.modules() if isinstance(one, StackedLora | StackedCore)]
    if not all(math.isclose(layer.scaling, scaling) for layer in layers):
        reasons.append(
            "it scales all linears alike and does not read `rank_pattern` and `alpha_pattern`, so"
            " its answers would be wrong"
        )
    if not reasons:
        return f"vLLM: `--enable-lora --max-lora-rank {room}`."
    return (
        f"vLLM does not load this folder as it is: {'; '.join(reasons)}. `dlora export RUN --merge`"
        " writes the whole model, with this adapter in its weights."
    )
