"""What the two halves must agree on before anything travels, and how a mismatch is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlora.errors import ModelError
from dlora.lora.core import Directions
from dlora.lora.factors import digest
from dlora.lora.units import Unit, active_groups, core_groups
from dlora.wire.split.frames import PROTOCOL, WIRES, Wire

MAX_R = 1 << 12


@dataclass(frozen=True)
class Agreement:
    """What one device's conversation is about."""

    groups: tuple[Unit, ...]  # that have factors, bottom to top, as they travel
    wire: Wire
    dropout: float | None  # of the body in training, instead of its own rates; None: its own
    r: int
    # SHA-256 of the modules' core directions, by their names in the body; None: placement literal
    directions: str | None


def body_facts(config: Any, embedding: Any) -> dict[str, Any]:
    """What can be compared without sending weights: the same checkpoint has the same token
    embedding on both sides.
    """
    weight = embedding.weight.detach().to("cpu", torch.bfloat16).contiguous()
    return {
        "model": config.model_type,
        "hidden_size": config.hidden_size,
        "embedding_width": weight.shape[1],
        "vocabulary": weight.shape[0],
        "embedding": hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest(),
    }


def proposal_text(facts: Mapping[str, Any], agreement: Agreement) -> str:
    """The device's proposal: canonical JSON."""
    groups = [_listed(group) for group in agreement.groups]
    manifest = {
        "protocol": PROTOCOL,
        **facts,
        "groups": groups,
        "wire": agreement.wire,
        "dropout": agreement.dropout,
        "r": agreement.r,
        "frame": agreement.directions,
    }
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"))


def agree(
    text: str, facts: Mapping[str, Any], groups: Sequence[Unit], directions: Directions
) -> Agreement | str:
    """What the cloud makes of a proposal: the agreement, or one line that says why there is
    none.
    """
    try:
        manifest = json.loads(text)
        protocol, wire, dropout, r, core, proposed = (
            manifest[key] for key in ("protocol", "wire", "dropout", "r", "frame", "groups")
        )
        targets = [str(name) for modules, _, _ in proposed for name in modules]
        known = dropout is None or (isinstance(dropout, float | int) and 0 <= dropout < 1)
        known = (
            known
            and isinstance(r, int)
            and 1 <= r <= MAX_R
            and (core is None or isinstance(core, str))
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return "the device's manifest is none; install the same dlora on both"
    if protocol != PROTOCOL:
        return (
            f"protocol: the device speaks {_short(protocol)}, the cloud {PROTOCOL}; install the"
            " same dlora on both"
        )
    if wire not in WIRES or not known:
        return (
            f"wire {_short(wire)}, dropout {_short(dropout)}, r {_short(r)}: not known here;"
            " install the same dlora on both"
        )
    for key, here in facts.items():
        if manifest.get(key) != here:
            return (
                f"{key}: the device has {_short(manifest.get(key))}, the cloud {_short(here)}; both"
                " need the same model"
            )
    try:
        active = active_groups(groups, targets)
    except ModelError as error:
        return ascii(str(error)[:300])[1:-1]
    if core is not None:
        refusal = _other_directions(core, targets, directions, r)
        if refusal is not None:
            return refusal
        active = core_groups(active, r)
    if proposed != [_listed(group) for group in active]:
        return (
            "groups: the halves order the model's modules differently; install the same"
            " transformers on both"
        )
    return Agreement(active, wire, None if dropout is None else float(dropout), r, core)


def directions_digest(directions: Directions, modules: Sequence[str]) -> str:
    """SHA-256 of the core directions of these modules, by their names in the body."""
    return digest(
        {
            f"{name}.{half}": directions[f"{name}.{half}"]
            for name in modules
            for half in ("lora_A", "lora_B")
        }
    )


def _other_directions(
    proposed: str, targets: Sequence[str], directions: Directions, r: int
) -> str | None:
    """Why the core directions of the device are not those of the cloud, in one line."""
    if not directions:
        return (
            "lora.placement core: this cloud has no frame; give it one (core: {r: ..., frame:"
            " FILE})"
        )
    missing = next((name for name in targets if f"{name}.lora_A" not in directions), None)
    if missing is not None:
        return f"lora.frame: the cloud's has no {missing}; make it anew there for all linears"
    here = len(directions[f"{targets[0]}.lora_A"]) if targets else r
    if here != r:
        return f"lora.r: the device has {r}, the cloud's frame {here}; both need the same"
    if directions_digest(directions, targets) != proposed:
        return "lora.frame: the device's is not the cloud's; copy the cloud's file to the device"
    return None


def _listed(group: Unit) -> list[Any]:
    return [list(group.modules), group.in_features, list(group.out_features)]


def _short(value: object) -> str:
    """On one line and printable, whatever the device wrote: an operator's terminal shows it."""
    text = ascii(value)[1:-1] if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
