"""Factors of many participants on one frozen model: the layers, and how they are attached.

A batch is (P x B, L), with the examples of participant 0 first. Every adapted linear reshapes its
input to (P, B x L, I) and applies each participant's own update, so one forward and backward pass
trains P participants (P = 1 is plain LoRA).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

# These come before peft: they silence the messages that peft's imports print.
from dlora.model.load import FrozenModel
from dlora.model.quiet import without_bitsandbytes

# isort: split
import torch
import torch.nn.functional as F

with without_bitsandbytes():
    import peft
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight
    from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.config.training import TAKEN_OUT, LoraSection
from dlora.errors import ModelError
from dlora.lora.core import Directions, compute_directions, directions_of
from dlora.lora.factors import Factors
from dlora.lora.targets import find_targets, short_names


class _Adapted(nn.Module):
    """A frozen linear with an update.

    ``bare``: the network has read its ``weight`` directly, which does not contain the update.
    """

    base_layer: nn.Module
    bare = False

    @property
    def weight(self) -> Any:
        """The frozen weight. Some architectures, for example T5, read its dtype before the call."""
        self.bare = True
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The frozen bias, for architectures that read weight and bias directly."""
        return self.base_layer.bias


class StackedLora(_Adapted):
    """y = base(x) + scaling * (x A_p^T) B_p^T, where row block p of x belongs to participant p.

    `StackedModel.use` binds ``lora_A`` (P, R, I) and ``lora_B`` (P, O, R). They are no
    nn.Parameters, because they are views of factors that exist longer than a binding.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, base_layer: nn.Module, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(P x ..., I) -> (P x ..., O)."""
        result: Tensor = self.base_layer(x)
        # a device map may have put this layer on another device
        lora_A, lora_B = self.lora_A.to(x.device), self.lora_B.to(x.device)
        x = F.dropout(x.to(lora_A.dtype), self.dropout, self.training)
        x_PNI = x.reshape(len(lora_A), -1, x.shape[-1])
        x_PNR = torch.bmm(x_PNI, lora_A.transpose(1, 2))
        result_PNO = result.reshape(len(lora_A), -1, result.shape[-1]).to(x_PNR.dtype)
        # baddbmm adds the product in place: a separate tensor for the update would take (P, N, O)
        # more memory, forward and backward
        y_PNO = torch.baddbmm(result_PNO, x_PNR, lora_B.transpose(1, 2), alpha=self.scaling)
        return y_PNO.view(result.shape).to(result.dtype)


class StackedDora(StackedLora):
    """y = b + m / n (W x + scaling (x A_p^T) B_p^T), where n = |W + scaling B_p A_p|, row by row,
    is a constant for the gradient (DoRA, arXiv 2402.09353, section 4.3).

    `StackedModel.use` binds ``lora_magnitude_vector`` (P, O), which is m, too.
    """

    lora_magnitude_vector: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(P x ..., I) -> (P x ..., O)."""
        result: Tensor = self.base_layer(x)
        lora_A, lora_B = self.lora_A.to(x.device), self.lora_B.to(x.device)
        weight_OI = dequantize_module_weight(self.base_layer).detach()
        if isinstance(self.base_layer, Conv1D):
            weight_OI = weight_OI.T
        bias = getattr(self.base_layer, "bias", None)
        bare = result if bias is None else result - bias
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
            bare = F.linear(x, weight_OI.to(x.dtype))
        x_PNI = x.to(lora_A.dtype).reshape(len(lora_A), -1, x.shape[-1])
        update_PNO = torch.bmm(torch.bmm(x_PNI, lora_A.transpose(1, 2)), lora_B.transpose(1, 2))
        bare_PNO = bare.reshape(update_PNO.shape).to(update_PNO.dtype)
        norm_PO = self._norm(weight_OI.to(lora_A.dtype), lora_A.detach(), lora_B.detach())
        scale_P1O = (self.lora_magnitude_vector.to(x.device) / norm_PO).unsqueeze(1)
        more_PNO = (scale_P1O - 1) * bare_PNO + scale_P1O * update_PNO * self.scaling
        return result + more_PNO.view(result.shape).to(result.dtype)

    def _norm(self, weight_OI: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """|W + scaling B A|, row by row: (P, O). No (P, O, I) is made: the square of a row's norm
        is |w|^2 + 2 scaling b . (A w) + scaling^2 b^T (A A^T) b.
        """
        read_POR = torch.matmul(weight_OI, lora_A.transpose(1, 2))
        square_PO = weight_OI.square().sum(1) + 2 * self.scaling * (read_POR * lora_B).sum(-1)
        gram_PRR = torch.bmm(lora_A, lora_A.transpose(1, 2))
        square_PO += self.scaling**2 * (torch.bmm(lora_B, gram_PRR) * lora_B).sum(-1)
        return square_PO.clamp(min=0).sqrt()


class StackedCore(_Adapted):
    """y = base(x) + scaling * (x A^T) M_p^T B^T.

    All participants share the core directions A and B, and each has its own core M_p.
    `StackedModel.use` binds ``lora_M`` (P, R, R).
    """

    lora_M: Tensor
    lora_A: Tensor  # (R, I), frozen
    lora_B: Tensor  # (O, R), frozen

    def __init__(
        self, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = scaling
        self.dropout = dropout
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(P x ..., I) -> (P x ..., O)."""
        result: Tensor = self.base_layer(x)
        read = F.linear(
            F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training), self.lora_A
        )
        read_PNR = read.reshape(len(self.lora_M), -1, read.shape[-1])
        turned_PNR = torch.bmm(read_PNR, self.lora_M.to(x.device).transpose(1, 2))
        flat = result.reshape(-1, result.shape[-1]).to(turned_PNR.dtype)
        y = torch.addmm(flat, turned_PNR.flatten(0, 1), self.lora_B.T, alpha=self.scaling)
        return y.view(result.shape).to(result.dtype)


class StackedLinear(nn.Module):
    """A trained head: y = x W_p^T + b_p.

    `StackedModel.use` binds ``weight`` (P, O, I) and ``bias`` (P, O).
    """

    weight: Tensor
    bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(P x ..., I) -> (P x ..., O)."""
        x = x.to(self.weight)  # on its device, as its dtype
        x_PNI = x.reshape(len(self.weight), -1, x.shape[-1])
        y_PNO = torch.bmm(x_PNI, self.weight.transpose(1, 2))
        if self.bias is not None:
            y_PNO = y_PNO + self.bias.unsqueeze(1)
        return y_PNO.view(*x.shape[:-1], y_PNO.shape[-1])


@dataclass
class StackedModel:
    """A frozen model to which the factors of any number of participants can be bound.

    - ``initial``: name -> the value from which every participant starts (on the CPU, without a
      participant dimension).
    - ``frozen_head``: the names in ``initial`` that are never trained in this run (a new head under
      ``train_head: false``).
    - ``peft_config``: the PEFT config that is written to an adapter folder of this model.
    - ``directions``: under placement core, A and B of each module; else empty.
    - ``taken_out``: the A and B that PiSSA or OLoRA have taken out of the frozen weights, where the
      participants begin; else empty. An adapter folder gives them back to the weights.
    - ``head_rest``: the head's tensors that belong to no linear. They are never trained, but an
      adapter folder holds them too.
    """

    network: Any
    initial: dict[str, Tensor]
    frozen_head: frozenset[str]
    peft_config: peft.LoraConfig
    directions: Directions = field(default_factory=dict)
    head_rest: dict[str, Tensor] = field(default_factory=dict)
    taken_out: dict[str, Tensor] = field(default_factory=dict)

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
) -> StackedModel:
    """Let PEFT place and initialise the modules, then replace PEFT's layers with stacked layers.

    A is drawn on the CPU from ``seed``, and B is zero. Under placement core, A and B are the
    ``directions`` (computed here when they are not given), and the core is zero. The network is
    changed in place. ``weights_here`` is false when the adapted linears have no weights, so that
    the directions cannot be compared with them. Raises ModelError when a target matches nothing or
    no linear, or when the directions belong to another model; raises ConfigError when a weight has
    fewer than ``lora.r`` directions.
    """
    network, head = frozen.network, frozen.head
    targets = find_targets(network, section, head)
    written = short_names(network, targets)
    peft_config = peft.LoraConfig(
        r=section.r,
        lora_alpha=whole(section.lora_alpha),
        lora_dropout=section.lora_dropout,
        target_modules=list(targets),
        rank_pattern=dict(section.rank_pattern or {}),
        alpha_pattern={name: whole(alpha) for name, alpha in (section.alpha_pattern or {}).items()},
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=section.init_lora_weights,
        # GPT-2 stores weights transposed
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),
        task_type=peft.TaskType.SEQ_CLS if task == "classification" else peft.TaskType.CAUSAL_LM,
    )
    _refuse_taken_out(network, section, targets)
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
            initial[f"{name}.lora_A"] = _fresh(layer.lora_A["default"].weight)
            initial[f"{name}.lora_B"] = _fresh(layer.lora_B["default"].weight)
            if section.use_dora:
                magnitude = layer.lora_magnitude_vector["default"].weight
                initial[f"{name}.lora_magnitude_vector"] = _fresh(magnitude)
            stacked = StackedDora if section.use_dora else StackedLora
            base, scaling = layer.get_base_layer(), layer.scaling["default"]
            _replace(network, name, stacked(base, scaling, section.lora_dropout))
    head_factors: Factors = {}
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and any(
            name == top or name.startswith(f"{top}.") for top in head
        ):
            head_factors |= {
                f"{name}.{attribute}": _fresh(value)
                for attribute, value in layer.named_parameters()
            }
            _replace(network, name, StackedLinear())
    # for example a norm's weight: PEFT reads the whole head from the adapter folder
    head_rest = {
        name: _fresh(value)
        for name, value in network.state_dict().items()
        if any(name.startswith(f"{top}.") for top in head) and name not in head_factors
    }
    peft_config.modules_to_save = list(head) or None
    peft_config.target_modules = written  # a list keeps its order, which a set does not
    peft_config.base_model_name_or_path = frozen.source
    peft_config.inference_mode = True
    resting = frozenset() if section.train_head else frozenset(head_factors)
    taken_out = dict(initial) if section.init_lora_weights in TAKEN_OUT else {}
    return StackedModel(
        network=network,
        initial=initial | head_factors,
        frozen_head=resting,
        peft_config=peft_config,
        directions=directions or {},
        head_rest=head_rest,
        taken_out=taken_out,
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
        _replace(
            network,
            name,
            StackedCore(
                linears[name], lora_A, lora_B, layer.scaling["default"], section.lora_dropout
            ),
        )
    return directions


def _refuse_taken_out(network: nn.Module, section: LoraSection, targets: Collection[str]) -> None:
    """Raise ModelError where PiSSA or OLoRA cannot take A and B out of a weight."""
    if section.init_lora_weights not in TAKEN_OUT:
        return
    for name in targets:
        linear: Any = network.get_submodule(name)
        if isinstance(linear, Conv1D) and section.init_lora_weights == "olora":
            raise ModelError(
                f"lora.init_lora_weights olora: {name} stores its weight transposed, which PEFT's"
                " OLoRA does not know; take pissa"
            )
        r = section.r
        for pattern, other in (section.rank_pattern or {}).items():
            r = other if get_pattern_key([pattern], name) == pattern else r
        most = min(linear.weight.shape)
        if r > most:
            raise ModelError(
                f"lora.init_lora_weights {section.init_lora_weights}: rank {r}, but {name} has only"
                f" {most} rows or columns; lower lora.r"
            )


def whole(number: float) -> float:
    """16.0 becomes 16, because vLLM and SGLang read ``lora_alpha`` as a whole number."""
    return int(number) if number == int(number) else number


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)
