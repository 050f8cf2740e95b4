"""Writes an adapter to a folder and reads it again; no other file knows PEFT's file format."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dlora.errors import ModelError, RunError
from dlora.files import write_atomically
from dlora.lora.bottleneck_io import FACTS, check_bottleneck_folder, write_bottleneck
from dlora.lora.bottleneck_io import WEIGHTS as BOTTLENECK
from dlora.lora.core import pairs
from dlora.lora.model_card import model_card
from dlora.lora.stacked import StackedModel, whole
from dlora.lora.swapped import SwappedModel

_PREFIX = "base_model.model."  # the name PeftModel gives the network it wraps
_WEIGHTS = "adapter_model.safetensors"
_TRAINED = "model.safetensors"
# Written too under placement core: M cannot be computed back from B M exactly.
_CORES = "core.safetensors"
BEGUN_FROM = "begun-from"  # the folder of a run with the adapter from which it began
# what a run and the adapter from which it begins must have in common
_ALIKE = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
)


def save_adapter(
    folder: Path, factors: Mapping[str, Tensor], model: StackedModel, tokenizer: Any = None
) -> None:
    """Write one participant's factors, (1, ...) each, so that PEFT can load them.

    ``PeftModel.from_pretrained(base, folder)`` then gives the trained model. A core M is written as
    the ordinary pair A and B M, where A and B are its core directions. The cores themselves go to a
    second file, which `load_adapter` reads. A README.md says what the folder holds. When a
    ``tokenizer`` is given, its files are written too, because servers look for them in the folder.
    Raises RunError when the folder cannot be written.

    PEFT has no bottleneck adapters: their folder has a form of its own.
    """
    own = {name: tensor.detach().float().cpu() for name, tensor in factors.items()}
    try:
        if model.bottleneck is not None:
            write_bottleneck(folder, own, model, tokenizer)
        else:
            _write_peft(folder, own, model, tokenizer)
    except OSError as error:
        raise RunError(
            f"adapter {folder} cannot be written ({error.strerror}); fix that, then go on with"
            " --resume"
        ) from error


def _write_peft(
    folder: Path, own: Mapping[str, Tensor], model: StackedModel, tokenizer: Any
) -> None:
    weights = (
        model.state(own)
        if isinstance(model, SwappedModel)
        else {
            _to_peft(name): _given_back(name, tensor[0], model.taken_out).contiguous()
            for name, tensor in pairs(own, model.directions).items()
        }
    )
    weights |= {_to_peft(name): tensor for name, tensor in model.head_rest.items()}
    cores = {
        name: tensor[0].contiguous() for name, tensor in own.items() if name.endswith(".lora_M")
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _WEIGHTS, save(weights, metadata={"format": "pt"}))
    if cores:
        write_atomically(folder / _CORES, save(cores))
    config = _exported(model)
    config.save_pretrained(str(folder))
    write_atomically(folder / "README.md", model_card(model, config))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _given_back(name: str, tensor: Tensor, taken_out: Mapping[str, Tensor]) -> Tensor:
    """A or B of twice the rank, for the weight as it was before ``taken_out`` left it.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0].
    """
    if name not in taken_out:
        return tensor
    if name.endswith(".lora_A"):
        return torch.cat([tensor, taken_out[name]])
    if name.endswith(".lora_B"):
        return torch.cat([tensor, -taken_out[name]], dim=1)
    return tensor


def _exported(model: StackedModel) -> peft.LoraConfig:
    """The PEFT config that a folder of this model has."""
    config = copy.deepcopy(model.peft_config)
    assert config is not None  # the folder of a bottleneck adapter has another form
    if model.taken_out:  # twice the rank, the same scaling
        more = math.sqrt(2) if config.use_rslora else 2
        config.r, config.lora_alpha = 2 * config.r, whole(more * config.lora_alpha)
        config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
        config.alpha_pattern = {
            name: whole(more * alpha) for name, alpha in config.alpha_pattern.items()
        }
    return config


def save_trained(folder: Path, factors: Mapping[str, Tensor]) -> None:
    """Write the factors, (1, ...) each, under the names of the model's parameters.

    A transformers Trainer reads this file when it resumes. Raises RunError when the file cannot be
    written.
    """
    own = {name: tensor[0].detach().cpu().contiguous() for name, tensor in factors.items()}
    try:
        write_atomically(folder / _TRAINED, save(own, metadata={"format": "pt"}))
    except OSError as error:
        raise RunError(
            f"adapter {folder} cannot be written ({error.strerror}); fix that, then save again"
        ) from error


def load_adapter(
    folder: Path, model: StackedModel, more: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read one participant's factors as (1, ...) tensors.

    ``more``: other tensors that the file must hold, of these shapes. Raises RunError when a file
    cannot be read, or when the names or shapes in it differ from those of ``model``.
    """
    if isinstance(model, SwappedModel):
        try:
            return model.factors_of(folder / _WEIGHTS)
        except (OSError, safetensors.SafetensorError, ModelError) as error:
            raise RunError(f"adapter {folder}: {_WEIGHTS} cannot be read ({error})") from error
    expected, taken_out = {**model.initial, **(more or {})}, model.taken_out
    stored: dict[str, Tensor] = {}
    own_form = any(name.endswith(".down_weight") for name in expected)  # a bottleneck's
    cores = any(name.endswith(".lora_M") for name in expected)
    for file in [BOTTLENECK] if own_form else [_WEIGHTS, *([_CORES] if cores else [])]:
        try:
            stored |= load_file(folder / file)
        except (OSError, safetensors.SafetensorError) as error:
            raise RunError(f"adapter {folder}: {file} cannot be read ({error})") from error
    inside = {name: name if own_form else _to_peft(name) for name in expected}
    factors = {name: stored[path].unsqueeze(0) for name, path in inside.items() if path in stored}
    for name in factors.keys() & set(taken_out):  # the first half is the participant's own
        if name.endswith(".lora_A"):
            factors[name] = factors[name].chunk(2, dim=1)[0]
        elif name.endswith(".lora_B"):
            factors[name] = factors[name].chunk(2, dim=2)[0]
    for name, tensor in expected.items():
        if name not in factors:
            raise RunError(
                f"adapter {folder}: holds no {name}; it belongs to another model or another"
                " lora.target_modules"
            )
        if factors[name].shape[1:] != tensor.shape:
            raise RunError(
                f"adapter {folder}: {name} has shape {tuple(factors[name].shape[1:])}, expected"
                f" {tuple(tensor.shape)}"
            )
    return factors


def merge_into(network: Any, folder: Path) -> Any:
    """Add the adapter in ``folder`` to the weights of ``network``, and its head; returns the
    network. Raises RunError when the adapter is virtual tokens, which no weight can hold.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of transformers 6
        loaded: Any = peft.PeftModel.from_pretrained(network, str(folder))
        if loaded.active_peft_config.is_prompt_learning:
            raise RunError(
                f"{folder}: virtual tokens stand before the text, and no weight can hold them; load"
                " the folder with PEFT"
            )
        return loaded.merge_and_unload()


def keep_begun(given: Path, run: Path) -> None:
    """Copy the adapter from which a run begins into the run's folder, if it is not there yet.

    The run is resumed and scored with the copy. Raises RunError when it cannot be written.
    """
    kept = run / BEGUN_FROM
    if kept.is_dir():
        return
    made = run / f".{BEGUN_FROM}.tmp"
    try:
        made.mkdir(exist_ok=True)
        peft_folder = (given / _WEIGHTS).exists()
        for name in (_WEIGHTS, "adapter_config.json") if peft_folder else (BOTTLENECK, FACTS):
            write_atomically(made / name, (given / name).read_bytes())
        made.rename(kept)
    except OSError as error:
        raise RunError(f"adapter {given} cannot be copied to {kept} ({error.strerror})") from error


def begin_from(folder: Path, model: StackedModel) -> None:
    """Let every participant begin with the adapter in a folder: ``model.initial`` and the rest of
    the head become those of the folder.

    Raises ModelError when the folder holds no adapter, or one of another form.
    """
    inside: Callable[[str], str] = _to_peft
    block, file_name = "lora", _WEIGHTS
    if model.bottleneck is not None:
        block, file_name, inside = "bottleneck", BOTTLENECK, str
        check_bottleneck_folder(folder, model.bottleneck)
    else:
        _check_alike(folder, model)
    try:
        found = load_adapter(folder, model, model.head_rest)
    except RunError as error:
        raise ModelError(f"{block}.adapter: {error}") from error
    with safetensors.safe_open(folder / file_name, "pt") as file:
        more = set(file.keys()) - {inside(name) for name in found}
    if more and not isinstance(model, SwappedModel):  # whose tensors were compared already
        raise ModelError(
            f"{block}.adapter: {folder} also holds {min(more)}, which {block}.target_modules here"
            " do not name; name the same"
        )
    for name, tensor in found.items():
        if name in model.initial:
            model.initial[name] = tensor[0].float()
        else:
            model.head_rest[name] = tensor[0].float()
            model.network.get_parameter(name).data.copy_(tensor[0])


def _check_alike(folder: Path, model: StackedModel) -> None:
    """Raise ModelError if the folder holds no LoRA adapter, or one of another form."""
    try:
        stored = peft.PeftConfig.from_pretrained(str(folder)) if folder.is_dir() else None
    except (OSError, ValueError, TypeError, KeyError):
        stored = None
    if not isinstance(stored, peft.LoraConfig):
        raise ModelError(
            f"lora.adapter: {folder} is no folder with a LoRA adapter of PEFT (adapter_config.json"
            f" and {_WEIGHTS})"
        )
    if stored.init_lora_weights not in (None, True, False, "gaussian"):
        raise ModelError(
            f"lora.adapter: {folder} was made with init_lora_weights {stored.init_lora_weights},"
            " which belongs to changed weights of the model; save it in PEFT with"
            " path_initial_model_for_weight_conversion"
        )
    before, now = ({key: getattr(of, key) for key in _ALIKE} for of in (stored, model.peft_config))
    if differing := [key for key in _ALIKE if before[key] != now[key]]:
        there = ", ".join(f"{key} {before[key]}" for key in differing)
        here = ", ".join(f"lora.{key} {now[key]}" for key in differing)
        raise ModelError(
            f"lora.adapter: {folder} has {there}, and the config has {here}; make them the same"
        )


def _to_peft(name: str) -> str:
    """The name of a tensor in the file: ``m.lora_A`` -> ``base_model.model.m.lora_A.weight``.

    A head's tensor gets only the prefix. A core keeps its name, because PEFT knows no cores.
    """
    if name.endswith(".lora_M"):
        return name
    return (
        f"{_PREFIX}{name}.weight" if name.endswith((".lora_A", ".lora_B")) else f"{_PREFIX}{name}"
    )
