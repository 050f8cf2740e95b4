"""What all peers of a training script must agree on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dlora.config.peers_file import PeersFile
from dlora.errors import ConfigError, RunError
from dlora.files import write_atomically
from dlora.lora.factors import digest
from dlora.model.fingerprints import tokenizer_fingerprint

FORM = 1  # another number: peers of other versions of dlora do not mix with this one
# keys of PEFT's configs that may differ from site to site
_NOT_COMPARED = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
    "tokenizer_name_or_path",
)
START_FILE = "start.json"  # in the state folder of a peer


def script_manifest(
    section: PeersFile,
    shapes: Mapping[str, tuple[int, ...]],
    start: Mapping[str, str],
    frozen: str | None,
    adapter: Mapping[str, Any],
    tokenizer: Any,
    agree: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of a script's peers.

    ``shapes``: of the tensors that train, by name. ``start``: from `start_values`. ``frozen``: a
    hash of the weights that do not train. ``adapter``: what `adapter_facts` returned.

    Raises ConfigError if ``agree`` holds what JSON cannot.
    """
    try:
        agreed = json.loads(json.dumps(agree))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"agree must be a dict that JSON can hold ({error})") from error
    return {
        "script": FORM,
        "rounds": section.rounds,
        "topology": section.topology.model_dump(mode="json", exclude_none=True),
        "weights": section.weights,
        "peers": section.members,
        "rule": section.rule,
        "period": section.period if section.rule == "alternate" else None,
        "wire": section.wire,
        "tensors": [f"{name} {_text(shape)}" for name, shape in shapes.items()],
        "start": dict(start),
        "frozen": frozen,
        "adapter": dict(adapter),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "agree": agreed,
    }


def adapter_facts(model: object) -> dict[str, Any]:
    """What PEFT's config of each adapter says besides tensors, such as the scaling; else empty.

    Left out: where a site has the base model, and what is not about the computation.
    """
    kept: dict[str, Any] = {}
    bare = getattr(model, "module", model)  # of DistributedDataParallel
    for name, config in getattr(bare, "peft_config", {}).items():
        facts = {key: value for key, value in config.to_dict().items() if key not in _NOT_COMPARED}
        kept[name] = json.loads(json.dumps(facts, default=_plain, sort_keys=True))
    return kept


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def start_values(folder: Path, values: Mapping[str, Tensor], goes_on: bool) -> dict[str, str]:
    """A hash of each tensor's first value, as the state folder keeps it since the first start.

    ``values``: the tensors as they are now. ``goes_on``: the script has loaded a checkpoint, so its
    tensors are not the first values any more. Raises RunError if they should be and are not.
    """
    path = folder / START_FILE
    if not path.exists():
        if goes_on:
            raise RunError(
                f"{folder} holds nothing of the run that the loaded checkpoint belongs to; name its"
                " state_dir, or start anew without load_state_dict"
            )
        start = _hashes(values)
        write_atomically(path, json.dumps(start))
        return start
    try:
        kept: dict[str, str] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); start anew in another state_dir"
        ) from error
    if not goes_on and kept != _hashes(values):
        raise RunError(
            f"{folder} holds a run that began with other values; load its checkpoint and give its"
            " state to load_state_dict, or start anew in another state_dir"
        )
    return kept


def _hashes(values: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: digest({name: tensor})[:16] for name, tensor in values.items()}


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})" if shape else "(a single number)"
