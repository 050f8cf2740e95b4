"""What the two halves must agree on before tensors travel, and how a mismatch is reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlora.config.bottleneck import ACTIVATIONS, Activation
from dlora.errors import ModelError
from dlora.lora.core import Directions
from dlora.lora.factors import digest
from dlora.lora.units import Unit, adapted_units, bottleneck_units, core_units
from dlora.wire.split.frames import PROTOCOL, WIRES, Wire

MAX_R = 1 << 12


@dataclass(frozen=True)
class Agreement:
    """What the cloud and one device have agreed on for one link."""

    # modules that have factors, by shared input, from bottom to top; frames count them in this
    # order
    units: tuple[Unit, ...]
    wire: Wire
    # dropout rate of the body in training; None: the body keeps its own rates
    dropout: float | None
    # SHA-256 of the core directions of all modules; None: placement literal
    directions: str | None
    activation: Activation | None = None  # of bottleneck adapters; None: the adapter is LoRA


def body_facts(config: Any, embedding: Any) -> dict[str, Any]:
    """Facts that show whether both halves have the same model, without sending weights.

    Two halves of one checkpoint have the same token embedding. The hash is taken over its values in
    bfloat16.
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
    """The device's proposal as canonical JSON: ``facts`` from `body_facts` and the agreement."""
    units = [_listed(unit) for unit in agreement.units]
    manifest = {
        "protocol": PROTOCOL,
        **facts,
        "groups": units,
        "wire": agreement.wire,
        "dropout": agreement.dropout,
        "frame": agreement.directions,
        "activation": agreement.activation,
    }
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"))


def agree(
    text: str, facts: Mapping[str, Any], units: Sequence[Unit], directions: Directions
) -> Agreement | str:
    """The cloud's answer to a proposal: the agreement, or one line that says why there is none.

    ``facts``, ``units`` and ``directions`` describe the cloud's own body; ``units`` are all its
    linears.
    """
    try:
        manifest = json.loads(text)
        if (protocol := manifest["protocol"]) != PROTOCOL:
            return (
                f"protocol: the device speaks {_short(protocol)}, the cloud {PROTOCOL}; install"
                " the same dlora on both"
            )
        wire, dropout, core, activation, proposed = (
            manifest[key] for key in ("wire", "dropout", "frame", "activation", "groups")
        )
        ranks = {
            str(name): r
            for modules, _, _, own in proposed
            for name, r in zip(modules, own, strict=True)
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        return "the device's manifest is none; install the same dlora on both"
    strange = [r for r in ranks.values() if type(r) is not int or not 1 <= r <= MAX_R]
    known = dropout is None or (isinstance(dropout, float | int) and 0 <= dropout < 1)
    known = (
        known
        and (core is None or isinstance(core, str))
        and (activation is None or (activation in ACTIVATIONS and core is None))
    )
    if wire not in WIRES or not known or strange:
        return (
            f"wire {_short(wire)}, dropout {_short(dropout)}, ranks {_short(strange)}, activation"
            f" {_short(activation)}: not known here; install the same dlora on both"
        )
    for key, here in facts.items():
        if manifest.get(key) != here:
            return (
                f"{key}: the device has {_short(manifest.get(key))}, the cloud {_short(here)}; both"
                " need the same model"
            )
    try:
        bottleneck = activation is not None
        active = (bottleneck_units if bottleneck else adapted_units)(units, ranks)
    except ModelError as error:
        return ascii(str(error)[:300])[1:-1]
    if core is not None:
        refusal = _other_directions(core, ranks, directions)
        if refusal is not None:
            return refusal
        active = core_units(active)
    if proposed != [_listed(unit) for unit in active]:
        return (
            "units: the halves order the model's modules differently; install the same"
            " transformers on both"
        )
    rate = None if dropout is None else float(dropout)
    return Agreement(active, wire, rate, core, activation)


def directions_digest(directions: Directions, modules: Sequence[str]) -> str:
    """SHA-256 of the core directions of these modules; ``modules`` are names in the body."""
    return digest(
        {
            f"{name}.{half}": directions[f"{name}.{half}"]
            for name in modules
            for half in ("lora_A", "lora_B")
        }
    )


def _other_directions(
    proposed: str, ranks: Mapping[str, int], directions: Directions
) -> str | None:
    """One line that says how the core directions of device and cloud differ; None: they are the
    same.
    """
    if not directions:
        return (
            "lora.placement core: this cloud has no frame; give it one (core: {r: ..., frame:"
            " FILE})"
        )
    missing = next((name for name in ranks if f"{name}.lora_A" not in directions), None)
    if missing is not None:
        return f"lora.frame: the cloud's has no {missing}; make it anew there for all linears"
    for name, r in ranks.items():
        if (here := len(directions[f"{name}.lora_A"])) != r:
            return f"lora.r: the device has {r}, the cloud's frame {here}; both need the same"
    if directions_digest(directions, [*ranks]) != proposed:
        return "lora.frame: the device's is not the cloud's; copy the cloud's file to the device"
    return None


def _listed(unit: Unit) -> list[Any]:
    return [list(unit.modules), unit.in_features, list(unit.out_features), list(unit.ranks)]


def _short(value: object) -> str:
    """At most 80 printable characters on one line.

    The device wrote the value, and an operator's terminal shows it.
    """
    text = ascii(value)[1:-1] if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
