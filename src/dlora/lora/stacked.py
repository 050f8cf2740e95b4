"""Factors of many participants on one frozen model, and how the layers are attached to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# These come before peft: they silence the messages that peft's imports print.
from dlora.model.load import FrozenModel
from dlora.model.quiet import without_bitsandbytes

# isort: split
import torch

with without_bitsandbytes():
    import peft
    from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.config.tasks import TASKS, Task
from dlora.config.training import TAKEN_OUT, LoraSection
from dlora.errors import ModelError
from dlora.lora.biases import stack_biases, trained_biases
from dlora.lora.core import Directions, compute_directions, directions_of
from dlora.lora.layers import (
    Bottleneck,
    StackedCore,
    StackedDora,
    StackedLora,
    fresh,
    replace,
    stack_head,
)
from dlora.lora.taken_out import refuse_taken_out, take_out
from dlora.lora.targets import find_targets, short_names


@dataclass
class StackedModel:
    """A frozen model to which the factors of any number of participants can be bound.

    - ``task``: what it is trained for.
    - ``initial``: name -> the value from which every participant starts (on the CPU, without a
      participant dimension).
    - ``frozen_head``: the names in ``initial`` that are never trained in this run (a new head under
      ``train_head: false``).
    - ``peft_config``: the PEFT config that is written to an adapter folder of this model.
    - ``bottleneck``: the same for bottleneck adapters, which PEFT does not have; one of the two.
    - ``directions``: under placement core, A and B of each module; else empty.
    - ``nothing``: the values with which a module's tensors change nothing, where these are not
      simply zeros in B or M: A and B that PiSSA or OLoRA have taken out of the frozen weight, and
      DoRA's lengths of the frozen weight's rows.
    - ``head_rest``: the head's tensors that belong to no linear. They are never trained, but an
      adapter folder holds them too.
    """

    network: Any
    task: Task
    initial: dict[str, Tensor]
    frozen_head: frozenset[str]
    peft_config: peft.PeftConfig | None
    directions: Directions = field(default_factory=dict)
    head_rest: dict[str, Tensor] = field(default_factory=dict)
    nothing: dict[str, Tensor] = field(default_factory=dict)
    bottleneck: Bottleneck | None = None

    @property
    def taken_out(self) -> dict[str, Tensor]:
        """The A and B that PiSSA or OLoRA have taken out of the frozen weights; else empty.

        The participants begin with them. An adapter folder gives them back to the weights.
        """
        return {
            name: tensor
            for name, tensor in self.nothing.items()
            if name.endswith((".lora_A", ".lora_B"))
        }

    def use(self, factors: Mapping[str, Tensor], killed: frozenset[int] = frozenset()) -> None:
        """Bind every layer to these (P, ...) tensors until the next call. Nothing is copied.

        ``killed``: numbers of the units that no participant trains, for a model whose body runs
        elsewhere.
        """
        for name, tensor in factors.items():
            module, _, attribute = name.rpartition(".")
            setattr(self.network.get_submodule(module), attribute, tensor)

    def pass_begins(self) -> None:
        """Called before each forward pass: nothing to do, because this process has the model."""

    def passes_done(self, backward: bool) -> None:
        """Called when this process has no rows left for now: nothing to do here.

        ``backward``: whether there were backward passes.
        """

    def inputs_for(self, labels: Tensor) -> dict[str, Tensor]:
        """What the network's forward takes beside a batch with these labels: nothing here."""
        return {}

    @property
    def device(self) -> torch.device:
        """The torch device of the frozen weights; factors and batches must be on it too."""
        device: torch.device = next(self.network.parameters()).device
        return device


def attach(
    frozen: FrozenModel,
    section: LoraSection,
    task: str,
    seed: int,
    directions: Directions | None = None,
    weights_here: bool = True,
    kept: Mapping[str, Tensor] | None = None,
) -> StackedModel:
    """Let PEFT place and initialise the modules, then replace PEFT's layers with stacked layers.

    A is drawn on the CPU from ``seed``, and B is zero. Under placement core, A and B are the
    ``directions`` (computed here when they are not given), and the core is zero. ``kept``: the A
    and B that PiSSA or OLoRA took out of the weights in an earlier process of the run; None: they
    are computed. The network is changed in place. ``weights_here`` is false when the adapted
    linears have no weights, so that the directions cannot be compared with them. Raises ModelError
    when a target matches nothing or no linear, or when the directions belong to another model;
    raises ConfigError when a weight has fewer than ``lora.r`` directions.
    """
    network, head = frozen.network, frozen.head
    targets = find_targets(network, section, head)
    takes_out = section.init_lora_weights in TAKEN_OUT
    biases = trained_biases(network, section.bias, targets, head)
    written = short_names(network, targets)
    peft_config = lora_config(network, section, task, targets)
    refuse_taken_out(network, section, targets)
    try:
        with torch.random.fork_rng(devices=[]), without_bitsandbytes():
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(peft_config, network)
    except ValueError as error:
        raise ModelError(
            f"lora.target_modules: {section.target_modules} cannot be adapted (PEFT:"
            f" {str(error).splitlines()[0][:200]})"
        ) from error

    placed = {
        name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)
    }
    assert set(placed) == set(targets), f"PEFT adapted {set(placed) ^ set(targets)}"
    if section.placement == "core":
        directions = _place_cores(network, placed, section, directions, weights_here)
        initial = {f"{name}.lora_M": torch.zeros(section.r, section.r) for name in placed}
    else:
        initial = {}
        for name, layer in placed.items():
            halves = (
                take_out(name, layer, section.init_lora_weights, kept)
                if takes_out
                else (fresh(half["default"].weight) for half in (layer.lora_A, layer.lora_B))
            )
            initial[f"{name}.lora_A"], initial[f"{name}.lora_B"] = halves
            if section.use_dora:
                magnitude = layer.lora_magnitude_vector["default"].weight
                initial[f"{name}.lora_magnitude_vector"] = fresh(magnitude)
            stacked = StackedDora if section.use_dora else StackedLora
            base, scaling = layer.get_base_layer(), layer.scaling["default"]
            replace(network, name, stacked(base, scaling, section.lora_dropout))
    adapted = {f"{name}.bias": f"{name}.base_layer.bias" for name in placed}
    bias_factors = stack_biases(network, [adapted.get(name, name) for name in biases])
    head_factors, head_rest = stack_head(network, head)
    peft_config.modules_to_save = list(head) or None
    peft_config.target_modules = written  # a list keeps its order, which a set does not
    peft_config.base_model_name_or_path = frozen.source
    peft_config.inference_mode = True
    resting = frozenset() if section.train_head else frozenset(head_factors)
    nothing = {
        name: tensor
        for name, tensor in initial.items()
        if takes_out or name.endswith(".lora_magnitude_vector")
    }
    return StackedModel(
        network=network,
        task=TASKS[task],
        initial=initial | bias_factors | head_factors,
        frozen_head=resting,
        peft_config=peft_config,
        directions=directions or {},
        head_rest=head_rest,
        nothing=nothing,
    )


def lora_config(
    network: nn.Module, section: LoraSection, task: str, targets: Sequence[str]
) -> peft.LoraConfig:
    """PEFT's config of LoRA on the linears ``targets``."""
    return peft.LoraConfig(
        r=section.r,
        lora_alpha=whole(section.lora_alpha),
        lora_dropout=section.lora_dropout,
        target_modules=list(targets),
        rank_pattern=dict(section.rank_pattern or {}),
        alpha_pattern={name: whole(alpha) for name, alpha in (section.alpha_pattern or {}).items()},
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        bias=section.bias,
        # what is taken out is taken by `take_out`
        init_lora_weights=True
        if section.init_lora_weights in TAKEN_OUT
        else section.init_lora_weights,
        # GPT-2 stores weights transposed
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),
        task_type=TASKS[task].peft,
    )


def _place_cores(
    network: nn.Module,
    placed: Mapping[str, Any],
    section: LoraSection,
    directions: Directions | None,
    weights_here: bool,
) -> Directions:
    """Replace PEFT's layers with stacked cores; returns the core directions."""
    linears: dict[str, nn.Module] = {name: layer.get_base_layer() for name, layer in placed.items()}
    directions = (
        compute_directions(linears, section.r)
        if directions is None
        else directions_of(directions, linears, section.r, weights_here)
    )
    for name, layer in placed.items():
        device = next(linears[name].parameters()).device
        lora_A, lora_B = (directions[f"{name}.{half}"].to(device) for half in ("lora_A", "lora_B"))
        replace(
            network,
            name,
            StackedCore(
                linears[name], lora_A, lora_B, layer.scaling["default"], section.lora_dropout
            ),
        )
    return directions


def whole(number: float) -> float:
    """16.0 becomes 16, because vLLM and SGLang read ``lora_alpha`` as a whole number."""
    return int(number) if number == int(number) else number
