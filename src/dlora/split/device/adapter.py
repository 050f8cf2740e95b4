"""The factors on the device: their updates, their gradients, and what the cloud gets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dlora.lora.factors import BOTTLENECK, adds
from dlora.seeds import derive_seed
from dlora.split.agreement import Agreement
from dlora.split.tensors import factor_shapes, shares, through
from dlora.wire.split.frames import ACTIVE, FIRST_VERSION, LEFT_OUT, Begin, HandOff


class Layer(Protocol):
    """One adapted module, with its factors as attributes: lora_A and lora_B, or lora_M, or the
    four of a bottleneck.

    A factor may have a first dimension of 1, for the one participant.
    """

    scaling: float
    dropout: float


@dataclass
class _Kept:
    """What a unit's backward on the device needs."""

    x: Tensor
    factors: list[Tensor]  # detached factors of each module, which share memory with the real ones
    update: Tensor


@dataclass
class Call:
    """One forward through the cloud, and what its backward needs."""

    number: int
    begins: list[Begin]
    hidden_width: int
    factors: Sequence[Tensor]  # in the order of ``Adapter.tensors``
    kept: dict[tuple[int, int], _Kept] = field(default_factory=dict)  # (part, unit)
    num_rows: dict[int, int] = field(default_factory=dict)  # part -> rows of its hidden


class Adapter:
    """The factors on the device, by unit: it computes updates forward and gradients backward.

    ``layers``: module name -> layer.
    """

    def __init__(self, agreement: Agreement, layers: Mapping[str, Layer]) -> None:
        self.agreement, self.units, self.layers = agreement, agreement.units, layers
        self._factor_names: tuple[str, ...] = ("lora_A", "lora_B")
        if agreement.directions is not None:
            self._factor_names = ("lora_M",)
        elif agreement.activation is not None:
            self._factor_names = BOTTLENECK
        self.tensors = [
            (name, factor)
            for unit in self.units
            for name in unit.modules
            for factor in self._factor_names
        ]
        self._places = {tensor: place for place, tensor in enumerate(self.tensors)}

    @property
    def num_factors(self) -> int:
        """The number of factors of a module: 2 (A and B), or 1 (M), or 4 (a bottleneck)."""
        return len(self._factor_names)

    def factors(self) -> list[Tensor]:
        """The present factors of every module, in the order of ``tensors``."""
        return [getattr(self.layers[name], factor) for name, factor in self.tensors]

    def update(self, call: Call, part: int, number: int, x: Tensor) -> Tensor:
        """The updates of a unit's modules, side by side: (N, in_features) -> (N, sum of
        out_features).

        An update is s (x A^T) B^T, with s the scaling. Under placement core it is s z M^T, where z
        is the module's own r columns of x, and of a bottleneck act(x D^T + d) U^T + u.
        """
        begin, kept, unit = call.begins[part], list[Tensor](), self.units[number]
        with torch.set_grad_enabled(begin.keep):
            x = x.detach().to(call.factors[0].device).requires_grad_(begin.keep)
            updates = []
            core, activation = self.agreement.directions is not None, self.agreement.activation
            shapes = factor_shapes(unit, self.agreement)
            for name, own, shaped in zip(unit.modules, shares(x, unit, core), shapes, strict=True):
                layer = self.layers[name]
                factors = [
                    tensor.detach()
                    .reshape(shape)
                    .requires_grad_(begin.keep and tensor.requires_grad)
                    for tensor, shape in zip(
                        self._of_module(call.factors, name), shaped, strict=True
                    )
                ]
                if begin.seed is not None:
                    own = _dropped(own, layer.dropout, f"{begin.seed}/{name}")
                updates.append(through(factors, own, activation) * layer.scaling)
                kept += factors
            update = torch.cat(updates, dim=1)
        if begin.keep:
            call.kept[part, number] = _Kept(x, kept, update)
        return update

    def gradients(
        self, call: Call, part: int, number: int, gradient: Tensor, reply: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients that follow from ``gradient``, the gradient of the loss by the unit's
        update.

        Returns dx (N, in_features), or None without ``reply``, and the gradients of the unit's
        factors, None for a factor that does not train.
        """
        kept = call.kept.pop((part, number))
        wanted = [
            *([kept.x] if reply else []),
            *(tensor for tensor in kept.factors if tensor.requires_grad),
        ]
        found = iter(
            torch.autograd.grad(kept.update, wanted, gradient.to(kept.update.device))
            if wanted
            else ()
        )
        dx = next(found) if reply else None
        return dx, [next(found) if tensor.requires_grad else None for tensor in kept.factors]

    def handed_off(self, factors: Sequence[Tensor], number: int) -> Tensor:
        """A unit's factors as `HandOff` holds them: (1, numbers) float32 on the CPU.

        The last factor of each module is multiplied by the scaling.
        """
        flat = []
        for name in self.units[number].modules:
            *first, last = self._of_module(factors, name)
            flat += [*first, last * self.layers[name].scaling]
        return torch.cat([tensor.detach().reshape(1, -1).float() for tensor in flat], dim=1).cpu()

    def is_zero(self, factors: Sequence[Tensor], number: int) -> bool:
        """Whether a unit adds nothing: B, M or the up of each of its modules is zero.

        They are zero at the start, and again when a schedule has dropped the unit.
        """
        return not any(
            factors[self._places[name, factor]].any()
            for name in self.units[number].modules
            for factor in self._factor_names
            if adds(f"{name}.{factor}")
        )

    def _of_module(self, factors: Sequence[Tensor], name: str) -> list[Tensor]:
        return [factors[self._places[name, factor]] for factor in self._factor_names]


class HandOffs:
    """Which version of a killed unit's factors the cloud must use.

    Factors with other values are a new version: a unit that is revived, trained and killed again
    gets one. A unit that stays killed keeps its version and is not sent again on the same link.
    Each call still compares the values with the last ones, because mixing and loading also change
    factors and do not report it.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._last: dict[int, tuple[int, Tensor]] = {}  # unit -> version, content

    def units(
        self, factors: Sequence[Tensor], killed: frozenset[int], held: dict[int, int]
    ) -> tuple[tuple[int, ...], list[HandOff]]:
        """What `Begin.units` says, and the hand-offs that must be sent before it.

        ``held``: unit -> version that the cloud has; changed in place.
        """
        if not killed:
            return (), []
        units, frames = [], []
        for number in range(len(self._adapter.units)):
            if number not in killed:
                units.append(ACTIVE)
            elif self._adapter.is_zero(factors, number):
                units.append(LEFT_OUT)
            else:
                version, content = self._version(factors, number)
                units.append(version)
                if held.get(number) != version:
                    held[number] = version
                    frames.append(HandOff(number, version, content))
        return tuple(units), frames

    def _version(self, factors: Sequence[Tensor], number: int) -> tuple[int, Tensor]:
        content = self._adapter.handed_off(factors, number)
        before, known = self._last.get(number, (FIRST_VERSION - 1, None))
        if known is None or not torch.equal(content, known):
            self._last[number] = before + 1, content
        return self._last[number]


def _dropped(x: Tensor, rate: float, purpose: str) -> Tensor:
    """LoRA's own dropout; the same ``purpose`` always draws the same mask."""
    if not rate:
        return x
    generator = torch.Generator().manual_seed(derive_seed(0, "lora-dropout", purpose))
    keep = torch.rand(x.shape, generator=generator) >= rate
    return x * keep.to(x.device) / (1 - rate)
