"""One part in the cloud: where its tokens stand, and how it asks the device for updates."""

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

    def __call__(self, what: What, group: int, shape: tuple[int, int]) -> Tensor:
        """Its tensor, (rows, width) float32 on the CPU."""


class CloudPart:
    """One part in the cloud: where its real tokens stand, and how it asks the device for updates.

    ``directions``: under placement core, A and B of each module. ``handed_off``: of killed groups,
    each module's factors.

    Its attributes are the state of one forward and backward, which share all of it.
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
        self.begin, self.groups, self.device = begin, agreement.groups, device
        self._core, self._directions, self._handed_off = (
            agreement.directions is not None,
            directions,
            handed_off,
        )
        self._say, self.hear = say, hear
        self._places = {
            name: (number, place)
            for number, group in enumerate(self.groups)
            for place, name in enumerate(group.modules)
        }
        # group -> its input, the updates not yet fetched
        self._asked: dict[int, tuple[Tensor, list[Tensor | None]]] = {}
        # below the lowest group nothing has a gradient
        self._anchor = torch.zeros((), device=device, requires_grad=begin.keep)
        mask = bits(begin.mask, begin.rows * begin.columns)
        self.mask = torch.from_numpy(mask).view(begin.rows, begin.columns).to(device)
        # (N,) of the real tokens in the flattened part
        self.index = torch.from_numpy(mask.nonzero()[0]).to(device)

    def update(self, module: str, x: Tensor) -> Tensor | None:
        """What is added to the output of ``module`` for the input ``x`` (..., I); None where
        nothing is.
        """
        number, place = self._places.get(module, (0, None))
        if place is None or self._unit(number) == LEFT_OUT:
            return None
        if number not in self._asked:
            self._asked[number] = (x, list(self._updates(number, x)))
        asked, updates = self._asked[number]
        update = updates[place]
        assert asked is x and update is not None  # else the modules are no group
        updates[place] = None
        if not any(kept is not None for kept in updates):
            del self._asked[number]
        return update

    def _unit(self, number: int) -> int:
        return self.begin.units[number] if self.begin.units else ACTIVE

    def _updates(self, number: int, x: Tensor) -> Sequence[Tensor]:
        """The update of each module of a group, from the device or from factors that it handed
        off.
        """
        group = self.groups[number]
        if self._core:
            x = torch.cat(
                [F.linear(x.float(), self._direction(name, "lora_A", x)) for name in group.modules],
                dim=-1,
            )
        if self._unit(number) == ACTIVE:
            updates: Sequence[Tensor] = _Ask.apply(x, self._anchor, self, number)  # type: ignore[no-untyped-call]
        else:
            own = zip(self._handed_off[number], shares(x.float(), group, self._core), strict=True)
            updates = [
                through([factor.to(x.device) for factor in factors], share)
                for factors, share in own
            ]
        if self._core:
            named = zip(group.modules, updates, strict=True)
            updates = [
                F.linear(update, self._direction(name, "lora_B", update)) for name, update in named
            ]
        return updates

    def _direction(self, name: str, half: str, like: Tensor) -> Tensor:
        return self._directions[f"{name}.{half}"].to(like.device)

    def forget(self) -> None:
        """Let go of what a broken forward has left: updates hold the graph, and it holds this
        part.
        """
        self._asked.clear()

    def say(self, what: What, group: int, tensor: Tensor, reply: bool = False) -> None:
        """Send a tensor of this part."""
        self._say(
            Values(
                what, self.begin.call, self.begin.part, group, tensor.detach().float().cpu(), reply
            )
        )

    def gather(self, padded: Tensor) -> Tensor:
        """(..., width) -> (N, width): the real tokens, or a row for each of the part's rows (a
        pooler's input).
        """
        flat = padded.reshape(-1, padded.shape[-1])
        return (
            flat
            if len(flat) == len(self.index) or len(flat) == self.begin.rows
            else flat[self.index]
        )

    def scatter(self, rows: Tensor, like: Tensor) -> Tensor:
        """The way back: (N, width) -> (..., width) with zeros where no token is; shape, dtype and
        device of ``like``.
        """
        rows = rows.to(like.device, like.dtype)
        shape = (*like.shape[:-1], rows.shape[-1])
        if len(rows) == like.shape[:-1].numel():
            return rows.contiguous().view(shape)
        padded = rows.new_zeros(like.shape[:-1].numel(), rows.shape[-1])
        padded[self.index] = rows
        return padded.view(shape)


class _Ask(torch.autograd.Function):
    """y = what the device computes from x; backward asks it for dx."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, part: CloudPart, number: int
    ) -> tuple[Tensor, ...]:
        group, rows = part.groups[number], part.gather(x)
        part.say("input", number, rows)
        update = part.hear("update", number, (len(rows), group.width))
        ctx.part, ctx.number = part, number
        ctx.like = x.new_empty(0).expand(*x.shape[:-1], 0)  # shape, dtype, device
        own = torch.split(update, list(group.out_features), dim=1)
        return tuple(part.scatter(each, x) for each in own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        part: CloudPart = ctx.part
        group, wanted = part.groups[ctx.number], ctx.needs_input_grad[0]
        rows = torch.cat([part.gather(gradient) for gradient in gradients], dim=1)
        part.say("update-gradient", ctx.number, rows, reply=wanted)
        if not wanted:
            return None, None, None, None
        return (
            part.scatter(
                part.hear("input-gradient", ctx.number, (len(rows), group.in_features)), ctx.like
            ),
            None,
            None,
            None,
        )


def through_the_cloud(part: CloudPart, forward: Callable[[CloudPart], Tensor]) -> Values | Done:
    """One part, there and back; ``forward`` runs the body and gives what the head reads (rows,
    hidden width).

    Returns the last word, to be sent when nothing of the part is left here: the device may fill the
    place at once.
    """
    begin = part.begin
    with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(part.begin.keep):
        # a slow device holds up this thread only, also where backward would share a thread among
        # all (GPUs)
        hidden = forward(part)
        if not begin.keep:
            return Values("hidden", begin.call, begin.part, 0, hidden.detach().float().cpu())
        part.say("hidden", 0, hidden)
        gradient = part.hear("hidden-gradient", 0, (len(hidden), hidden.shape[1]))
        if hidden.requires_grad:
            hidden.backward(gradient.to(hidden.device, hidden.dtype))
        return Done(begin.call, begin.part)
