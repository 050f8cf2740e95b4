"""The layers with which several participants train their own updates in one pass.

A batch is (P x B, L), with the examples of participant 0 first. Every adapted linear reshapes its
input to (P, B x L, I) and applies each participant's own update, so one forward and backward pass
trains P participants (P = 1 is plain LoRA).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

# This comes before peft: it silences the messages that peft's imports print.
from dlora.model.quiet import without_bitsandbytes

# isort: split
import torch
import torch.nn.functional as F

with without_bitsandbytes():
    from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.lora.factors import BOTTLENECK, Factors


class Adapted(nn.Module):
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


class StackedLora(Adapted):
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


class StackedCore(Adapted):
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


class StackedBottleneck(Adapted):
    """y = h + act(h D_p^T + d_p) U_p^T + u_p, where h = base(x), and row block p of x belongs to
    participant p.

    `StackedModel.use` binds ``down_weight`` (P, R, O), which is D, ``down_bias`` (P, R),
    ``up_weight`` (P, O, R), which is U, and ``up_bias`` (P, O).
    """

    # as of LoRA's layers: an update is neither scaled nor dropped
    scaling, dropout = 1.0, 0.0

    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor

    def __init__(self, base_layer: nn.Module, activation: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(P x ..., I) -> (P x ..., O)."""
        h: Tensor = self.base_layer(x)
        # a device map may have put this layer on another device
        factors = [getattr(self, name).to(h.device) for name in BOTTLENECK]
        down_weight, down_bias, up_weight, up_bias = factors
        h_PNO = h.to(down_weight.dtype).reshape(len(down_weight), -1, h.shape[-1])
        z_PNR = torch.baddbmm(down_bias.unsqueeze(1), h_PNO, down_weight.transpose(1, 2))
        a_PNR = activate(self.activation, z_PNR)
        update_PNO = torch.baddbmm(up_bias.unsqueeze(1), a_PNR, up_weight.transpose(1, 2))
        return h + update_PNO.view(h.shape).to(h.dtype)


def activate(activation: str, z: Tensor) -> Tensor:
    """gelu, relu or silu of each number of ``z``."""
    a: Tensor = getattr(F, activation)(z)
    return a


@dataclass(frozen=True)
class Bottleneck:
    """What an adapter folder says of the bottleneck adapters in it."""

    base_model: str
    task: str
    r: int
    activation: str
    modules: tuple[str, ...]  # full names of the linears after which they stand


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
        # a copy, because FSDP2 warns of a model whose result is a view
        return y_PNO.view(*x.shape[:-1], y_PNO.shape[-1]).clone()


def stack_head(network: nn.Module, head: Collection[str]) -> tuple[Factors, Factors]:
    """Replace the linears of the ``head`` by stacked ones; returns their values, and those of its
    other tensors, which are never trained.
    """
    factors: Factors = {}
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and any(
            name == top or name.startswith(f"{top}.") for top in head
        ):
            factors |= {
                f"{name}.{attribute}": fresh(value) for attribute, value in layer.named_parameters()
            }
            replace(network, name, StackedLinear())
    # for example a norm's weight: PEFT reads the whole head from the adapter folder
    rest = {
        name: fresh(value)
        for name, value in network.state_dict().items()
        if any(name.startswith(f"{top}.") for top in head) and name not in factors
    }
    return factors, rest


def fresh(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU."""
    return tensor.detach().float().cpu().clone()


def replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` in the place of the module of that name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)
