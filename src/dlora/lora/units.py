"""Units: modules that have the same input, found by one forward pass on fake tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dlora.errors import ModelError
from dlora.model.layers import LINEAR


@dataclass(frozen=True)
class Unit:
    """A unit: modules that read the same input, for example query, key and value.

    A bottleneck adapter is a unit by itself, whose input is the output of its linear.
    """

    modules: tuple[str, ...]  # dotted names inside the body
    in_features: int
    out_features: tuple[int, ...]  # one number for each module
    ranks: tuple[int, ...] = ()  # one number for each module; empty: no module is adapted

    @property
    def width(self) -> int:
        """The sum of the modules' output widths."""
        return sum(self.out_features)

    @property
    def cost(self) -> int:
        """Numbers per token that cloud and device exchange in one local step for this unit.

        They are the input and the modules' updates, each once forward and once (as a gradient)
        backward.
        """
        return 2 * (self.in_features + self.width)

    def device_flops(self, placement: Literal["literal", "core"], lowest: bool) -> int:
        """FLOPs per token of one local step on the device of a split, while this unit is active.

        The function `device_flops` says what is counted.

        - literal, for each module: forward z = x A^T and z B^T; backward the gradients of B and z
          (r d_out multiply-adds each), of A, and of x unless this is the ``lowest`` active unit
          (r d_in each).
        - literal bottleneck: down and up in the place of A and B.
        - core, for each module (the device has only M): forward z M^T; backward the gradients of M,
          and of z unless this is the lowest active unit (r r each).
        """
        through = 2 if lowest else 3
        if placement == "core":
            return 2 * through * sum(r * r for r in self.ranks)
        return 2 * sum(
            r * (3 * out + through * self.in_features)
            for r, out in zip(self.ranks, self.out_features, strict=True)
        )


def device_flops(
    units: Sequence[Unit], active: Collection[int], placement: Literal["literal", "core"]
) -> int:
    """FLOPs per token that the adapter costs the device of a split in one local step.

    ``active``: the units that train in this step; killed units cost nothing. A multiply-add counts
    as two FLOPs, as in torch's FlopCounterMode. Operations on single numbers (scaling, dropout,
    sums, the optimiser), DoRA's norms, the token embedding and the head are not counted. Nothing
    trains below the lowest active unit, so the gradient of its input is not computed. Where two
    units read the same input in parallel (GPT-NeoX), neither gradient is computed, but the second
    is counted here. In a run without a cloud the number says what a split would cost.
    """
    return sum(units[unit].device_flops(placement, unit == min(active)) for unit in active)


def find_units(make: Callable[[], Any]) -> tuple[Unit, ...]:
    """All linears of the body that ``make`` returns, as units in the order of its forward pass.

    The body is built and run with fake tensors, which have shapes and no values. Raises ModelError
    when the body needs token ids, when its forward pass on token embeddings fails, or when it calls
    a linear twice in one forward pass.
    """
    met: list[tuple[str, Tensor]] = []  # keeps the inputs alive, so that no two have the same id

    def note(name: str) -> Any:
        return lambda layer, inputs: met.append((name, inputs[0]))

    with FakeTensorMode(), torch.no_grad():
        skeleton = make().eval()
        refuse_ids(skeleton)
        linears = {
            name: layer for name, layer in skeleton.named_modules() if isinstance(layer, LINEAR)
        }
        for name, layer in linears.items():
            layer.register_forward_pre_hook(note(name))
        embedded = torch.zeros(1, 2, skeleton.get_input_embeddings().embedding_dim)
        try:
            skeleton(inputs_embeds=embedded, use_cache=False)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{type(skeleton).__name__} cannot be split: its forward on token embeddings fails"
                f" ({reason})"
            ) from error
    names = [name for name, _ in met]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ModelError(
            f"{type(skeleton).__name__} cannot be split: {twice} is called twice in one forward"
        )
    together: dict[int, list[str]] = {}
    for name, x in met:
        together.setdefault(id(x), []).append(name)
    return tuple(_unit(members, linears) for members in together.values())


def adapted_units(units: Sequence[Unit], ranks: Mapping[str, int]) -> tuple[Unit, ...]:
    """The units with only their adapted modules; units without any are left out.

    ``ranks``: the rank of each adapted module, by its name. Raises ModelError when a module is in
    no unit.
    """
    known = {name for unit in units for name in unit.modules}
    for target in sorted(set(ranks) - known):
        raise ModelError(
            f"lora.target_modules: {target} is not in the body; there are {_ends(known)}"
        )
    reduced = []
    for unit in units:
        kept = [
            (name, out)
            for name, out in zip(unit.modules, unit.out_features, strict=True)
            if name in ranks
        ]
        if kept:
            reduced.append(
                Unit(
                    tuple(name for name, _ in kept),
                    unit.in_features,
                    tuple(out for _, out in kept),
                    tuple(ranks[name] for name, _ in kept),
                )
            )
    return tuple(reduced)


def bottleneck_units(units: Sequence[Unit], ranks: Mapping[str, int]) -> tuple[Unit, ...]:
    """The bottleneck adapters after these linears, each a unit by itself.

    It reads the linear's output and adds an update of the same width. ``ranks``: the width of each
    bottleneck, by its linear. Raises ModelError when a linear is in no unit.
    """
    return tuple(
        Unit((name,), out, (out,), (ranks[name],))
        for unit in adapted_units(units, ranks)
        for name, out in zip(unit.modules, unit.out_features, strict=True)
    )


def core_units(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """These units as they are sent under placement core: r numbers per token and module each way.

    Forward, the cloud computes x A^T for every module of a unit (each module has its own A) and
    sends the results together. The device multiplies each module's r numbers by its M^T and sends
    them back, and the cloud multiplies them by the module's B^T. Backward, the gradients go the
    same way in reverse order.
    """
    return tuple(Unit(unit.modules, sum(unit.ranks), unit.ranks, unit.ranks) for unit in units)


def renamed(unit: Unit, prefix: str) -> Unit:
    """The same unit with ``prefix`` before its modules' names.

    The prefix is the name of the body within a whole model.
    """
    return replace(unit, modules=tuple(prefix + name for name in unit.modules))


def refuse_ids(body: Any) -> None:
    """Raise ModelError when the body needs more than token embeddings (``inputs_embeds``)."""
    parameters = inspect.signature(body.forward).parameters
    inside = [key for key in parameters if key in ("per_layer_inputs", "decoder_input_ids")]
    if (
        "inputs_embeds" not in parameters
        or inside
        or getattr(body.config, "is_encoder_decoder", False)
    ):
        raise ModelError(
            f"{type(body).__name__} needs token ids inside the body"
            f" ({', '.join(inside) or 'no inputs_embeds'}); take an encoder or a decoder that"
            " starts from its token embedding"
        )


def _unit(members: Sequence[str], linears: dict[str, nn.Module]) -> Unit:
    shapes = [_features(linears[name]) for name in members]
    return Unit(tuple(members), shapes[0][0], tuple(out for _, out in shapes))


def _features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features). GPT-2's Conv1D stores its weight transposed, as (I, O)."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def _ends(names: Collection[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))
