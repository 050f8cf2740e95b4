"""What the two halves must agree on before anything travels, and how a mismatch is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlora.errors import ModelError
from dlora.lora.groups import Group, active_groups
from dlora.split_frames import PROTOCOL, WIRES, Wire


@dataclass(frozen=True)
class Agreement:
    """What one device's conversation is about."""

    groups: tuple[Group, ...]  # that have factors, bottom to top
    wire: Wire
    dropout: float | None  # of the body in training, instead of its own rates; None: its own


def body_facts(config: Any, embedding: Any) -> dict[str, Any]:
    """What can be compared without sending weights: the same checkpoint has the same token embedding on both sides."""
    weight = embedding.weight.detach().to("cpu", torch.bfloat16).contiguous()
    return {
        "model": config.model_type,
        "hidden_size": config.hidden_size,
        "embedding_width": weight.shape[1],
        "vocabulary": weight.shape[0],
        "embedding": hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest(),
    }


def manifest_text(facts: Mapping[str, Any], agreement: Agreement) -> str:
    """The device's proposal: canonical JSON."""
    groups = [_listed(group) for group in agreement.groups]
    manifest = {
        "protocol": PROTOCOL,
        **facts,
        "groups": groups,
        "wire": agreement.wire,
        "dropout": agreement.dropout,
    }
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"))


def agree(text: str, facts: Mapping[str, Any], groups: Sequence[Group]) -> Agreement | str:
    """What the cloud makes of a proposal: the agreement, or one line that says why there is none."""
    try:
        manifest = json.loads(text)
        protocol, wire, dropout, proposed = (manifest[key] for key in ("protocol", "wire", "dropout", "groups"))
        targets = [str(name) for modules, _, _ in proposed for name in modules]
        rate = dropout is None or (isinstance(dropout, float | int) and 0 <= dropout < 1)
    except (ValueError, KeyError, TypeError, RecursionError):
        return "the device's manifest is none; install the same dlora on both"
    if protocol != PROTOCOL:
        return f"protocol: the device speaks {_short(protocol)}, the cloud {PROTOCOL}; install the same dlora on both"
    if wire not in WIRES or not rate:
        return f"wire {_short(wire)}, dropout {_short(dropout)}: not known here; install the same dlora on both"
    for key, here in facts.items():
        if manifest.get(key) != here:
            return f"{key}: the device has {_short(manifest.get(key))}, the cloud {_short(here)}; both need the same model"
    try:
        active = active_groups(groups, targets)
    except ModelError as error:
        return ascii(str(error)[:300])[1:-1]
    if proposed != [_listed(group) for group in active]:
        return "groups: the halves order the model's modules differently; install the same transformers on both"
    return Agreement(active, wire, None if dropout is None else float(dropout))


def _listed(group: Group) -> list[Any]:
    return [list(group.modules), group.in_features, list(group.out_features)]


def _short(value: object) -> str:
    """On one line and printable, whatever the device wrote: an operator's terminal shows it."""
    text = ascii(value)[1:-1] if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
