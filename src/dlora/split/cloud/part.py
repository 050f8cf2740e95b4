"""One part in the cloud: where its real tokens are, and how it asks the device for updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.lora.core import Directions
from dlora.split.agreement import Agreement
from dlora.split.tensors import bits, shares, through
from dlora.wire.split.frames import ACTIVE, LEFT_OUT, Begin, Done, Values, What


class Hears(Protocol):
    """Waits for the one frame that a part needs next, and checks it."""

    def __call__(self, what: What, unit: int, shape: tuple[int, int]) -> Tensor:
        """The tensor of that frame: ``shape`` is (rows, width); float32 on the CPU."""


class CloudPart:
    """One part in the cloud: where its real tokens are, and how it asks the device for updates.

    ``directions``: under placement core, A and B of each module. ``handed_off``: for each killed
    unit that adds something, the factors of its modules. ``say`` sends a frame to the device, and
    ``hear`` waits for one.

    Its attributes are the state of one forward and backward; each step needs most of them.
    """

    def __init__(
        self,
        begin: Begin,
        agreement: Agreement,
        directions: Directions,
        handed_off: Mapping[int, list[list[Tensor]]],
        device: torch.device,
        say: Callable[[Values], None],
        hear: Hears,
    ) -> None:
        self.begin, self.units, self.device = begin, agreement.units, device
        self._core, self._directions, self._handed_off = (
            agreement.directions is not None,
            directions,
            handed_off,
        )
        self._activation = agreement.activation
        self._say, self.hear = say, hear
        self._places = {
            name: (number, place)
            for number, unit in enumerate(self.units)
            for place, name in enumerate(unit.modules)
        }
        # unit -> its input, and the updates that the modules have not taken yet
        self._asked: dict[int, tuple[Tensor, list[Tensor | None]]] = {}
        # The input of the lowest unit needs no gradient. With this anchor torch still calls the
        # unit's backward.
        self._anchor = torch.zeros((), device=device, requires_grad=begin.keep)
        mask = bits(begin.mask, begin.rows * begin.columns)
        self.mask = torch.from_numpy(mask).view(begin.rows, begin.columns).to(device)
        # (N,) of the real tokens in the flattened part
        self.index = torch.from_numpy(mask.nonzero()[0]).to(device)

    def update(self, module: str, x: Tensor, output: Tensor) -> Tensor | None:
        """What the device's factors add to the ``output`` (..., out_features) of ``module`` for its
        input ``x`` (..., in_features). A bottleneck reads the output, and LoRA the input.

        Returns (..., out_features), or None if they add nothing.
        """
        x = x if self._activation is None else output
        number, place = self._places.get(module, (0, None))
        if place is None or self._unit(number) == LEFT_OUT:
            return None
        if number not in self._asked:
            self._asked[number] = (x, list(self._updates(number, x)))
        asked, updates = self._asked[number]
        update = updates[place]
        assert asked is x and update is not None  # otherwise these modules do not share one input
        updates[place] = None
        if not any(kept is not None for kept in updates):
            del self._asked[number]
        return update

    def _unit(self, number: int) -> int:
        return self.begin.units[number] if self.begin.units else ACTIVE

    def _updates(self, number: int, x: Tensor) -> Sequence[Tensor]:
        """The update of each module of a unit.

        The device computes the updates of an active unit. The cloud computes those of a killed
        unit from the factors that the device handed off.
        """
        unit = self.units[number]
        if self._core:
            x = torch.cat(
                [F.linear(x.float(), self._direction(name, "lora_A", x)) for name in unit.modules],
                dim=-1,
            )
        if self._unit(number) == ACTIVE:
            updates: Sequence[Tensor] = _Ask.apply(x, self._anchor, self, number)  # type: ignore[no-untyped-call]
        else:
            own = zip(self._handed_off[number], shares(x.float(), unit, self._core), strict=True)
            updates = [
                through([factor.to(x.device) for factor in factors], share, self._activation)
                for factors, share in own
            ]
        if self._core:
            named = zip(unit.modules, updates, strict=True)
            updates = [
                F.linear(update, self._direction(name, "lora_B", update)) for name, update in named
            ]
        return updates

    def _direction(self, name: str, half: str, like: Tensor) -> Tensor:
        return self._directions[f"{name}.{half}"].to(like.device)

    def forget(self) -> None:
        """Delete the updates that a failed forward has left.

        The updates refer to the graph, and the graph refers to this part: the memory would not be
        freed.
        """
        self._asked.clear()

    def say(self, what: What, unit: int, tensor: Tensor, reply: bool = False) -> None:
        """Send a tensor of this part."""
        self._say(
            Values(
                what, self.begin.call, self.begin.part, unit, tensor.detach().float().cpu(), reply
            )
        )

    def gather(self, padded: Tensor) -> Tensor:
        """Take the real tokens out of ``padded``: (..., width) -> (N, width).

        Two kinds of tensors stay as they are: a tensor that already has N rows, and a tensor with
        one row for each row of the part (the input of a pooler).
        """
        flat = padded.reshape(-1, padded.shape[-1])
        return (
            flat
            if len(flat) == len(self.index) or len(flat) == self.begin.rows
            else flat[self.index]
        )

    def scatter(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `gather`: (N, width) -> (..., width), with zeros at padding.

        The result has the leading dimensions, the dtype and the device of ``like``.
        """
        rows = rows.to(like.device, like.dtype)
        shape = (*like.shape[:-1], rows.shape[-1])
        if len(rows) == like.shape[:-1].numel():
            return rows.contiguous().view(shape)
        padded = rows.new_zeros(like.shape[:-1].numel(), rows.shape[-1])
        padded[self.index] = rows
        return padded.view(shape)


class _Ask(torch.autograd.Function):
    """The device's update as a torch function: forward asks for y given x, backward asks for dx."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, part: CloudPart, number: int
    ) -> tuple[Tensor, ...]:
        unit, rows = part.units[number], part.gather(x)
        part.say("input", number, rows)
        update = part.hear("update", number, (len(rows), unit.width))
        ctx.part, ctx.number = part, number
        # keeps the shape, dtype and device of x, and no memory
        ctx.like = x.new_empty(0).expand(*x.shape[:-1], 0)
        own = torch.split(update, list(unit.out_features), dim=1)
        return tuple(part.scatter(each, x) for each in own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        part: CloudPart = ctx.part
        unit, wanted = part.units[ctx.number], ctx.needs_input_grad[0]
        rows = torch.cat([part.gather(gradient) for gradient in gradients], dim=1)
        part.say("update-gradient", ctx.number, rows, reply=wanted)
        if not wanted:
            return None, None, None, None
        return (
            part.scatter(
                part.hear("input-gradient", ctx.number, (len(rows), unit.in_features)), ctx.like
            ),
            None,
            None,
            None,
        )


def through_the_cloud(part: CloudPart, forward: Callable[[CloudPart], Tensor]) -> Values | Done:
    """Run the forward of one part and, if the device wants it (`Begin.keep`), its backward.

    ``forward`` runs the body and returns what the head reads, (rows, hidden width).

    Returns the last frame of the part: the hidden states, or `Done` after a backward. Send it only
    when the part's memory here is free, because the device may begin another part at once.
    """
    begin = part.begin
    with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(part.begin.keep):
        # Backward stays in this thread. On a GPU torch would run the backwards of all parts in one
        # shared thread, and a slow device would hold up all others.
        hidden = forward(part)
        if not begin.keep:
            return Values("hidden", begin.call, begin.part, 0, hidden.detach().float().cpu())
        part.say("hidden", 0, hidden)
        gradient = part.hear("hidden-gradient", 0, (len(hidden), hidden.shape[1]))
        if hidden.requires_grad:
            hidden.backward(gradient.to(hidden.device, hidden.dtype))
        return Done(begin.call, begin.part)
