"""Finds a model's folder and refuses weights other than safetensors and code of its own."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dlora.model.quiet  # noqa: F401  # before transformers is imported

# isort: split
import transformers

from dlora.errors import ModelError

FORMS = (
    "give a folder with config.json, weights and tokenizer, a hub name (owner/name) or"
    " pkg://package/folder"
)
# For every from_pretrained and from_config; else transformers asks a question on standard input.
NO_CODE = {"trust_remote_code": False}
# For every model's from_pretrained, because the other weight files are pickle.
SAFE_WEIGHTS = {"use_safetensors": True}
# implementations that are part of transformers
_OURS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")


def find_model(model: str) -> str:
    """The folder or hub name for ``from_pretrained``. Raises ModelError when there is no folder."""
    if model.startswith("pkg://"):
        package, _, inside = model.removeprefix("pkg://").partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # the parent of a dotted name is missing; an invalid name
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"model {model}: package {package} is not installed; pip install"
                f" {package.replace('_', '-')}"
            )
        folder = Path(spec.submodule_search_locations[0], inside)
        if not folder.is_dir():
            raise ModelError(
                f"model {model}: package {package} has no folder {inside}; it holds"
                f" {_listing(folder.parent)}"
            )
        return str(folder)
    if os.path.isdir(model):  # False for a name that is too long, where Path.is_dir raises
        return model
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"model {model}: no such folder; {FORMS}")
    return model


def read_config(source: str) -> Any:
    """The architecture's configuration (transformers.PretrainedConfig).

    Raises ModelError when the folder has only pickled weights or needs its own Python code; raises
    OSError or ValueError, as transformers does, when there is no configuration.
    """
    if os.path.isdir(source):
        _refuse_other_weights(Path(source))
    raw, _ = transformers.PretrainedConfig.get_config_dict(source)
    for key, value in _implementations(raw):
        if value not in _OURS and not (
            value.startswith("flash_attention") and importlib.util.find_spec("flash_attn")
        ):
            raise ModelError(
                f"model {source}: config.json asks for {key} {value}, code that would come from"
                " elsewhere; remove that key"
            )
    known = raw.get("model_type") in transformers.CONFIG_MAPPING
    if "auto_map" in raw and not known:
        raise ModelError(
            f"model {source}: its architecture {raw.get('model_type')} is Python code of its own"
            " (auto_map), which dlora does not run; take an architecture that transformers holds"
        )
    return transformers.AutoConfig.from_pretrained(source, **NO_CODE)


def _implementations(raw: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, value) for every key that names an implementation of attention or experts."""
    for key, value in raw.items():
        if isinstance(value, dict):
            inner = {f"{key}.{name}_implementation": named for name, named in value.items()}
            yield from _implementations(inner if key.endswith("_implementation") else value)
        elif isinstance(value, str) and key.endswith("_implementation"):
            yield key, value


def _refuse_other_weights(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"model {folder}: it is an adapter; give the model that it belongs to, merged with it"
            " if need be"
        )
    if not any(folder.glob("*.safetensors")):
        others = sorted(
            path.name
            for end in ("bin", "pt", "pth", "h5", "msgpack", "ckpt")
            for path in folder.glob(f"*.{end}")
        )
        if others:
            raise ModelError(
                f"model {folder}: {others[0]} is no safetensors file, and to read it can run code;"
                " where you trust it, load it with transformers and save_pretrained to another"
                " folder, which writes model.safetensors"
            )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"model {folder}: {index.name} cannot be read ({error}); copy it anew"
            ) from error
        foreign = sorted(
            str(file)
            for file in files
            if Path(str(file)).name != file or not str(file).endswith(".safetensors")
        )
        if foreign:
            raise ModelError(
                f"model {folder}: {index.name} names {foreign[0]}; expected safetensors files"
                " beside it"
            )


def _listing(folder: Path) -> str:
    return (
        ", ".join(sorted(child.name for child in folder.iterdir())[:8])
        if folder.is_dir()
        else "no such folder"
    )
