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

    ``config``: the PEFT config in the folder. When the base model is a local folder, the text has
    the end of its path and not all of it, and the header does not name it, because the hub takes
    that for one of its own models.
    """
    base = str(config.base_model_name_or_path)
    on_hub = {} if Path(base).is_dir() else {"base_model": base}
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    facts = {**on_hub, "library_name": "peft", "tags": [kind.lower(), "dlora"]}
    if not on_hub:
        base = "/".join(Path(base).resolve().parts[-2:])  # the last part alone is often "model"
    factory = (
        "AutoModelForSequenceClassification.from_pretrained(base,"
        f" num_labels={model.network.config.num_labels})"
    )
    if _reads_the_mean(model):
        how = "The classifier reads the mean over the tokens: load it with `dlora eval`."
    else:
        classes = config.task_type == "SEQ_CLS"
        load = factory if classes else "AutoModelForCausalLM.from_pretrained(base)"
        how = (
            f"```python\nmodel = {load}\nmodel = peft.PeftModel.from_pretrained(model, folder)\n```"
        )
    header = f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n"
    if kind != "LORA":
        return (
            f"{header}# An adapter ({kind}) for {base}\n\nWritten by dlora {__version__}.\n\n{how}"
            "\n\nvLLM does not load this folder: it serves LoRA only.\n"
        )
    linears = ", ".join(sorted({name.rpartition(".")[2] for name in config.target_modules or ()}))
    return (
        f"{header}# A LoRA adapter for {base}\n\nRank"
        f" {config.r}, `lora_alpha` {config.lora_alpha}, on {linears}. Written by dlora"
        f" {__version__}.\n\n{how}\n\n{_in_vllm(model, config)}\n"
    )


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
