"""What the two halves say to each other in one step. No sockets in it.

Forward, one part (micro-batch) of N real tokens:

    device  Begin            embedded tokens (N, E)                        up
    cloud   input            x (N, I) of each active group, bottom to top  down
    device  update           s (x A^T) B^T of its modules (N, sum of O)    up
    cloud   hidden           what the head reads                           down

and backward the same the other way round: hidden-gradient up; update-gradient down, input-gradient up for each group, top to
bottom. The lowest group's input-gradient is not asked for: below it nothing trains. A group moves 2 (I + sum of O) numbers a
token (DLoRA, arXiv 2404.05182, as PrivSplit, section 2.1, describes it).

Under placement core (PrivateLoRA, arXiv 2311.14030) the cloud puts x through each module's A and what comes back through its B:
I and every O are r numbers then. A killed group is not spoken of: the cloud adds nothing, or computes with the factors that it
was handed (`HandOff`). Which groups are active stands in each part's Begin, so neither a crash nor a repetition can part the
two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dlora.lora.core import Frame
from dlora.split.adapter import Adapter, Call, shares, through
from dlora.split.agreement import Agreement
from dlora.split_frames import ACTIVE, LEFT_OUT, Begin, Done, Failed, SplitFrame, Values, What, Why

# The cloud's side


class Hears(Protocol):
    """Waits for the one frame that a part needs next, and checks it."""

    def __call__(self, what: What, group: int, shape: tuple[int, int]) -> Tensor:
        """Its tensor, (rows, width) float32 on the CPU."""


class CloudPart:
    """One part in the cloud: where its real tokens stand, and how it asks the device for updates.

    ``frame``: under placement core, A and B of each module. ``handed_off``: of killed groups, each module's factors.
    """

    def __init__(
        self,
        begin: Begin,
        agreement: Agreement,
        frame: Frame,
        handed_off: Mapping[int, list[list[Tensor]]],
        device: torch.device,
        say: Callable[[Values], None],
        hear: Hears,
    ) -> None:
        self.begin, self.groups, self.device = begin, agreement.groups, device
        self._core, self._frame, self._handed_off = agreement.frame is not None, frame, handed_off
        self._say, self.hear = say, hear
        self._places = {
            name: (number, place) for number, group in enumerate(self.groups) for place, name in enumerate(group.modules)
        }
        self._asked: dict[int, tuple[Tensor, list[Tensor | None]]] = {}  # group -> its input, the updates not yet fetched
        self._anchor = torch.zeros((), device=device, requires_grad=begin.keep)  # below the lowest group nothing has a gradient
        mask = bits(begin.mask, begin.rows * begin.columns)
        self.mask = torch.from_numpy(mask).view(begin.rows, begin.columns).to(device)
        self.index = torch.from_numpy(mask.nonzero()[0]).to(device)  # (N,) of the real tokens in the flattened part

    def update(self, module: str, x: Tensor) -> Tensor | None:
        """What is added to the output of ``module`` for the input ``x`` (..., I); None where nothing is."""
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
        """Of each module of a group, from the device or from what it handed off."""
        group = self.groups[number]
        if self._core:
            x = torch.cat([F.linear(x.float(), self._of_frame(name, "lora_A", x)) for name in group.modules], dim=-1)
        if self._unit(number) == ACTIVE:
            updates: Sequence[Tensor] = _Ask.apply(x, self._anchor, self, number)  # type: ignore[no-untyped-call]
        else:
            own = zip(self._handed_off[number], shares(x.float(), group, self._core), strict=True)
            updates = [through([factor.to(x.device) for factor in factors], share) for factors, share in own]
        if self._core:
            named = zip(group.modules, updates, strict=True)
            updates = [F.linear(update, self._of_frame(name, "lora_B", update)) for name, update in named]
        return updates

    def _of_frame(self, name: str, half: str, like: Tensor) -> Tensor:
        return self._frame[f"{name}.{half}"].to(like.device)

    def forget(self) -> None:
        """Let go of what a broken forward has left: updates hold the graph, and it holds this part."""
        self._asked.clear()

    def say(self, what: What, group: int, tensor: Tensor, reply: bool = False) -> None:
        """Send a tensor of this part."""
        self._say(Values(what, self.begin.call, self.begin.part, group, tensor.detach().float().cpu(), reply))

    def gather(self, padded: Tensor) -> Tensor:
        """(..., width) -> (N, width): the real tokens, or a row for each of the part's rows (a pooler's input)."""
        flat = padded.reshape(-1, padded.shape[-1])
        return flat if len(flat) == len(self.index) or len(flat) == self.begin.rows else flat[self.index]

    def scatter(self, rows: Tensor, like: Tensor) -> Tensor:
        """The way back: (N, width) -> (..., width) with zeros where no token is; shape, dtype and device of ``like``."""
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
    def forward(ctx: Any, x: Tensor, anchor: Tensor, part: CloudPart, number: int) -> tuple[Tensor, ...]:
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
        return part.scatter(part.hear("input-gradient", ctx.number, (len(rows), group.in_features)), ctx.like), None, None, None


def through_the_cloud(part: CloudPart, forward: Callable[[CloudPart], Tensor]) -> Values | Done:
    """One part, there and back; ``forward`` runs the body and gives what the head reads (rows, hidden width).

    Returns the last word, to be sent when nothing of the part is left here: the device may fill the place at once.
    """
    begin = part.begin
    with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(part.begin.keep):
        # a slow device holds up this thread only, also where backward would share a thread among all (GPUs)
        hidden = forward(part)
        if not begin.keep:
            return Values("hidden", begin.call, begin.part, 0, hidden.detach().float().cpu())
        part.say("hidden", 0, hidden)
        gradient = part.hear("hidden-gradient", 0, (len(hidden), hidden.shape[1]))
        if hidden.requires_grad:
            hidden.backward(gradient.to(hidden.device, hidden.dtype))
        return Done(begin.call, begin.part)


# The device's side


class Channel(Protocol):
    """One link to the cloud; both raise ChannelDown when it has ended."""

    def send(self, frame: SplitFrame) -> None:
        """Hand a frame to the wire."""

    def receive(self) -> SplitFrame:
        """The next frame."""


class PartFailed(Exception):
    """The cloud gave a part of a call up."""

    def __init__(self, call: int, why: Why, text: str) -> None:
        super().__init__(text)
        self.call, self.why = call, why


class Misbehaviour(ValueError):
    """The other half said what no half says here."""


def forward_on_device(channel: Channel, call: Call, adapter: Adapter) -> list[Tensor]:
    """All parts of a call up, every group answered; returns each part's hidden (rows, hidden width)."""
    for begin in call.begins:
        channel.send(begin)
    hidden: dict[int, Tensor] = {}
    asked: set[tuple[int, int]] = set()  # (part, group): each once, or a cloud could ask on and on
    while len(hidden) < len(call.begins):
        frame = _of(call, channel.receive())
        if frame is None:
            continue
        if not isinstance(frame, Values) or frame.what not in ("input", "hidden") or frame.part in hidden:
            raise Misbehaviour(f"the cloud sent {_name(frame)} in a forward")
        begin = call.begins[frame.part]
        if frame.what == "hidden":
            rows = int(bits(begin.needed, len(begin.embedded)).sum()) if begin.needed else begin.rows
            _check(frame, [(rows, call.hidden_width)])
            hidden[frame.part], call.num_rows[frame.part] = frame.tensor, rows
            continue
        if frame.group >= len(adapter.groups):
            raise Misbehaviour(f"the cloud asks for group {frame.group} of {len(adapter.groups)}")
        if begin.units and begin.units[frame.group] != ACTIVE:
            raise Misbehaviour(f"the cloud asks for group {frame.group}, which is killed")
        if (frame.part, frame.group) in asked:
            raise Misbehaviour(f"the cloud asks for group {frame.group} of part {frame.part} again")
        asked.add((frame.part, frame.group))
        width = adapter.groups[frame.group].in_features
        _check(frame, [(len(begin.embedded), width), (begin.rows, width)])
        update = adapter.update(call, frame.part, frame.group, frame.tensor)
        channel.send(Values("update", call.number, frame.part, frame.group, update.detach().cpu()))
    return [hidden[part] for part in range(len(call.begins))]


def backward_on_device(channel: Channel, call: Call, adapter: Adapter, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of a call's hidden up; returns those of the factors, in the order of ``adapter.tensors``."""
    for part, gradient in enumerate(gradients):
        channel.send(Values("hidden-gradient", call.number, part, 0, gradient))
    found: dict[tuple[int, int], list[Tensor | None]] = {}
    done: set[int] = set()
    while len(done) < len(call.begins):
        frame = _of(call, channel.receive())
        if frame is None:
            continue
        if isinstance(frame, Done):
            _check_done(call, frame.part, [group for part, group in found if part == frame.part])
            done.add(frame.part)
            continue
        if not isinstance(frame, Values) or frame.what != "update-gradient":
            raise Misbehaviour(f"the cloud sent {_name(frame)} in a backward")
        if (frame.part, frame.group) not in call.kept:
            raise Misbehaviour(f"the cloud sent a gradient for group {frame.group}, which it never asked for")
        _check(frame, [tuple(call.kept[frame.part, frame.group].update.shape)])
        dx, own = adapter.gradients(call, frame.part, frame.group, frame.tensor, frame.reply)
        if dx is not None:
            channel.send(Values("input-gradient", call.number, frame.part, frame.group, dx.cpu()))
        found[frame.part, frame.group] = own
    return _summed(adapter, len(call.begins), found)


def _summed(adapter: Adapter, num_parts: int, found: Mapping[tuple[int, int], list[Tensor | None]]) -> list[Tensor | None]:
    """Over parts, in their order and not in that of arrival: sums must not depend on the network."""
    totals: list[Tensor | None] = []
    for number, group in enumerate(adapter.groups):
        of_group: list[Tensor | None] = [None] * (adapter.num_factors * len(group.modules))
        for part in range(num_parts):
            for place, gradient in enumerate(found.get((part, number), ())):
                so_far = of_group[place]
                of_group[place] = gradient if so_far is None or gradient is None else so_far + gradient
        totals += of_group
    return totals


def _of(call: Call, frame: SplitFrame) -> Values | Done | None:
    """The frame, if it belongs to this call and not to one given up; raises PartFailed."""
    if not isinstance(frame, Values | Done | Failed):
        raise Misbehaviour(f"the cloud sent {_name(frame)} in a step")
    if frame.call != call.number:
        return None
    if frame.part >= len(call.begins):
        raise Misbehaviour(f"the cloud speaks of part {frame.part} of {len(call.begins)}")
    if isinstance(frame, Failed):
        raise PartFailed(frame.call, frame.why, frame.text)
    return frame


def _check_done(call: Call, part: int, groups: Sequence[int]) -> None:
    """A backward comes from the top: what it leaves out lies above all that it meets (a pooler that nobody reads)."""
    for kept_part, group in call.kept:
        if kept_part == part and group < max(groups, default=group + 1):
            raise Misbehaviour(f"the cloud ends a backward without the gradient of group {group}")


def _check(frame: Values, shapes: Sequence[tuple[int, ...]]) -> None:
    if tuple(frame.tensor.shape) not in shapes:
        raise Misbehaviour(f"the cloud sent {_name(frame)} of shape {tuple(frame.tensor.shape)}; it should be {shapes[0]}")


def _name(frame: SplitFrame) -> str:
    return frame.what if isinstance(frame, Values) else type(frame).__name__


def bits(packed: bytes, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(count,) booleans, as numpy.packbits packed them."""
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(bool)
