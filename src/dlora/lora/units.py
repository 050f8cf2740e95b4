"""Units: modules that share an input, found by a forward on fake tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dlora.errors import ModelError
from dlora.model.layers import LINEAR


@dataclass(frozen=True)
class Unit:
    """A unit: modules with one input. Query, key and value; gate and up; output; down."""

    modules: tuple[str, ...]  # dotted names inside the body
    in_features: int
    out_features: tuple[int, ...]  # one a module

    @property
    def width(self) -> int:
        """The width of the modules' updates side by side."""
        return sum(self.out_features)

    @property
    def cost(self) -> int:
        """Numbers a token between cloud and device in one local step: the input and the updates,
        there and back.
        """
        return 2 * (self.in_features + self.width)

    def device_flops(self, r: int, placement: Literal["literal", "core"], lowest: bool) -> int:
        """FLOPs a token of one local step on the device of a split, while this unit is active;
        `device_flops` has the rules.

        literal, of each module: z = x A^T and z B^T forward; backward the gradients of B and z (r
        d_out multiply-adds each), of A and, but for the ``lowest`` unit, x (r d_in each). core,
        where only M is on the device: z M^T forward, backward the gradients of M and, but for the
        lowest, z (r r each).
        """
        if placement == "core":
            return 2 * len(self.modules) * r * r * (2 if lowest else 3)
        return (
            2 * r * (3 * self.width + (2 if lowest else 3) * len(self.modules) * self.in_features)
        )


def device_flops(
    groups: Sequence[Unit], active: Collection[int], r: int, placement: Literal["literal", "core"]
) -> int:
    """FLOPs a token of one local step that the adapter costs the device of a split while the units
    ``active`` train.

    A multiply-add is two, as torch's FlopCounterMode counts; what goes number by number (scaling,
    dropout, sums, the optimiser) is not counted, nor are token embedding and head. Killed units
    cost nothing. Below the lowest active unit nothing trains, so its input's gradient is not asked
    for; where two units read one stream side by side (GPT-NeoX), neither's is, yet the second's is
    counted. Where the frozen model runs here too, it is what a split would cost.
    """
    return sum(groups[unit].device_flops(r, placement, unit == min(active)) for unit in active)


def find_units(make: Callable[[], Any]) -> tuple[Unit, ...]:
    """All linears of the body that ``make`` gives, in the order in which its forward meets them.

    It is made and run with tensors that have shapes and no numbers. Raises ModelError for a body
    that is not made of token after token through linears, or that wants token ids.
    """
    met: list[tuple[str, Tensor]] = []  # the inputs are held, so that no two share an id

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
    return tuple(_group(members, linears) for members in together.values())


def active_groups(groups: Sequence[Unit], targets: Collection[str]) -> tuple[Unit, ...]:
    """The groups reduced to the adapted modules; raises ModelError for a target that is in none."""
    known = {name for group in groups for name in group.modules}
    for target in sorted(set(targets) - known):
        raise ModelError(
            f"lora.target_modules: {target} is not in the body; there are {_ends(known)}"
        )
    reduced = []
    for group in groups:
        kept = [
            (name, out)
            for name, out in zip(group.modules, group.out_features, strict=True)
            if name in targets
        ]
        if kept:
            reduced.append(
                Unit(
                    tuple(name for name, _ in kept),
                    group.in_features,
                    tuple(out for _, out in kept),
                )
            )
    return tuple(reduced)


def core_groups(groups: Sequence[Unit], r: int) -> tuple[Unit, ...]:
    """What travels of these groups under placement core: of each module r numbers a token either
    way.

    The cloud reads x A^T of every module of a group side by side (each has an A of its own), the
    device answers with each module's r numbers times its M^T, the cloud puts them through its B;
    backward the same the other way round.
    """
    return tuple(
        Unit(group.modules, r * len(group.modules), (r,) * len(group.modules)) for group in groups
    )


def renamed(group: Unit, prefix: str) -> Unit:
    """With its modules' names inside a model whose body stands at ``prefix``."""
    return Unit(
        tuple(prefix + name for name in group.modules), group.in_features, group.out_features
    )


def refuse_ids(body: Any) -> None:
    """Raise ModelError for a body that cannot do with the token embeddings alone."""
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


def _group(members: Sequence[str], linears: dict[str, nn.Module]) -> Unit:
    shapes = [_features(linears[name]) for name in members]
    return Unit(tuple(members), shapes[0][0], tuple(out for _, out in shapes))


def _features(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs; GPT-2 stores its weights the other way round."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def _ends(names: Collection[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))
