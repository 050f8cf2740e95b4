"""Attaches the kind of adapter that a run's config names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dlora.config.run import Config
from dlora.config.training import only_biases
from dlora.lora.bottleneck import attach_bottleneck
from dlora.lora.core import Directions
from dlora.lora.stacked import StackedModel, attach
from dlora.lora.swapped import swap
from dlora.model.load import FrozenModel


def adapt(
    frozen: FrozenModel,
    config: Config,
    directions: Directions | None = None,
    weights_here: bool = True,
    kept: Mapping[str, Tensor] | None = None,
) -> StackedModel:
    """The model with the adapters that the config names. LoRA and bottlenecks are stacked, so that
    participants share a forward pass; what `_why_swapped` tells of is swapped. The other arguments
    and the errors are those of `attach`, `attach_bottleneck` and `swap`.
    """
    if config.bottleneck is not None:
        return attach_bottleneck(frozen, config.bottleneck, config.task, config.seed)
    reason = _why_swapped(config)
    if reason is not None:
        return swap(frozen, config, reason)
    return attach(frozen, config.lora, config.task, config.seed, directions, weights_here, kept)


def _why_swapped(config: Config) -> str | None:
    """Why participants cannot share a forward pass with these adapters; None: they can."""
    if config.peft is not None:
        kind = "trained biases" if only_biases(config.peft) else config.peft["peft_type"]
        return f"only lora and bottleneck train several at once, and the config asks for {kind}"
    if config.lora.modules_to_save is not None:
        return f"whole modules train ({', '.join(config.lora.modules_to_save)})"
    return None
