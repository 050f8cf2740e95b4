"""What the two halves say to each other in one step, and the device's side of it. No sockets.

The forward of one part (micro-batch) of N real tokens:

    device  Begin            embedded tokens (N, E)                        up
    cloud   input            x (N, I) of each active unit, bottom to top  down
    device  update           s (x A^T) B^T of its modules (N, sum of O)    up
    cloud   hidden           what the head reads                           down

N is the number of real tokens, E the width of embedded tokens, I and O the in and out features of a
module, s the scaling. A unit is the modules that share one input.

The backward goes the other way. The device sends hidden-gradient; then, for each unit from top to
bottom, the cloud sends update-gradient and the device answers with input-gradient. The cloud does
not ask for the input-gradient of the lowest unit, because nothing below that unit trains. In one
forward and backward a unit moves 2 (I + sum of O) numbers a token (DLoRA, arXiv 2404.05182, as
PrivSplit, section 2.1, describes it).

Under a bottleneck the linear's output h stands in the place of x, and U act(D h) in that of the
update; I and O are both the width of h.

Under placement core (PrivateLoRA, arXiv 2311.14030) the cloud multiplies x by each module's A
before it asks, and the answer by the module's B. A module then moves r numbers a token instead of I
and O. For a killed unit the cloud does not ask: it adds nothing, or it computes with the factors
that the device has handed off (`HandOff`). The Begin of each part says which units are active, so
both halves agree on them after a crash or a repetition too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from dlora.split.device.adapter import Adapter, Call
from dlora.split.tensors import bits
from dlora.wire.frame import Misbehaviour
from dlora.wire.split.frames import ACTIVE, Done, Failed, SplitFrame, Values, Why


class Channel(Protocol):
    """One link to the cloud; both methods raise ChannelDown when it has ended."""

    def send(self, frame: SplitFrame) -> None:
        """Send a frame."""

    def receive(self) -> SplitFrame:
        """Wait for the next frame and return it."""


class PartFailed(Exception):
    """The cloud gave up a part of a call. ``why`` is the reason code of the frame `Failed`."""

    def __init__(self, call: int, why: Why, text: str) -> None:
        super().__init__(text)
        self.call, self.why = call, why


def forward_on_device(channel: Channel, call: Call, adapter: Adapter) -> list[Tensor]:
    """Send all parts of a call and answer the cloud's questions, one for each part and active
    unit.

    Returns the hidden states of each part, (rows, hidden width). Raises PartFailed, ChannelDown,
    and Misbehaviour if the cloud sends what no correct cloud sends.
    """
    for begin in call.begins:
        channel.send(begin)
    hidden: dict[int, Tensor] = {}
    # (part, unit): each at most once, otherwise a wrong cloud could ask without end
    asked: set[tuple[int, int]] = set()
    while len(hidden) < len(call.begins):
        frame = _of(call, channel.receive())
        if frame is None:
            continue
        if (
            not isinstance(frame, Values)
            or frame.what not in ("input", "hidden")
            or frame.part in hidden
        ):
            raise Misbehaviour(f"the cloud sent {_name(frame)} in a forward")
        begin = call.begins[frame.part]
        if frame.what == "hidden":
            rows = (
                int(bits(begin.needed, len(begin.embedded)).sum()) if begin.needed else begin.rows
            )
            _check(frame, [(rows, call.hidden_width)])
            hidden[frame.part], call.num_rows[frame.part] = frame.tensor, rows
            continue
        if frame.unit >= len(adapter.units):
            raise Misbehaviour(f"the cloud asks for unit {frame.unit} of {len(adapter.units)}")
        if begin.units and begin.units[frame.unit] != ACTIVE:
            raise Misbehaviour(f"the cloud asks for unit {frame.unit}, which is killed")
        if (frame.part, frame.unit) in asked:
            raise Misbehaviour(f"the cloud asks for unit {frame.unit} of part {frame.part} again")
        asked.add((frame.part, frame.unit))
        width = adapter.units[frame.unit].in_features
        _check(frame, [(len(begin.embedded), width), (begin.rows, width)])
        update = adapter.update(call, frame.part, frame.unit, frame.tensor)
        channel.send(Values("update", call.number, frame.part, frame.unit, update.detach().cpu()))
    return [hidden[part] for part in range(len(call.begins))]


def backward_on_device(
    channel: Channel, call: Call, adapter: Adapter, gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Send the gradients of a call's hidden states, one (rows, hidden width) for each part.

    Returns the gradients of the factors, in the order of ``adapter.tensors``; None where the cloud
    sent none. Raises as `forward_on_device` does.
    """
    for part, gradient in enumerate(gradients):
        channel.send(Values("hidden-gradient", call.number, part, 0, gradient))
    found: dict[tuple[int, int], list[Tensor | None]] = {}
    done: set[int] = set()
    while len(done) < len(call.begins):
        frame = _of(call, channel.receive())
        if frame is None:
            continue
        if isinstance(frame, Done):
            _check_done(call, frame.part, [unit for part, unit in found if part == frame.part])
            done.add(frame.part)
            continue
        if not isinstance(frame, Values) or frame.what != "update-gradient":
            raise Misbehaviour(f"the cloud sent {_name(frame)} in a backward")
        if (frame.part, frame.unit) not in call.kept:
            raise Misbehaviour(
                f"the cloud sent a gradient for unit {frame.unit}, which it never asked for"
            )
        _check(frame, [tuple(call.kept[frame.part, frame.unit].update.shape)])
        dx, own = adapter.gradients(call, frame.part, frame.unit, frame.tensor, frame.reply)
        if dx is not None:
            channel.send(Values("input-gradient", call.number, frame.part, frame.unit, dx.cpu()))
        found[frame.part, frame.unit] = own
    return _summed(adapter, len(call.begins), found)


def _summed(
    adapter: Adapter, num_parts: int, found: Mapping[tuple[int, int], list[Tensor | None]]
) -> list[Tensor | None]:
    """Sum the gradients over the parts in the order of the parts.

    The order in which they arrive depends on the network, and a sum of floats depends on its order.
    """
    totals: list[Tensor | None] = []
    for number, unit in enumerate(adapter.units):
        of_unit: list[Tensor | None] = [None] * (adapter.num_factors * len(unit.modules))
        for part in range(num_parts):
            for place, gradient in enumerate(found.get((part, number), ())):
                so_far = of_unit[place]
                of_unit[place] = (
                    gradient if so_far is None or gradient is None else so_far + gradient
                )
        totals += of_unit
    return totals


def _of(call: Call, frame: SplitFrame) -> Values | Done | None:
    """The frame if it belongs to this call; None if it belongs to a call that was given up.

    Raises PartFailed if the cloud gave up a part of this call.
    """
    if not isinstance(frame, Values | Done | Failed):
        raise Misbehaviour(f"the cloud sent {_name(frame)} in a step")
    if frame.call != call.number:
        return None
    if frame.part >= len(call.begins):
        raise Misbehaviour(f"the cloud speaks of part {frame.part} of {len(call.begins)}")
    if isinstance(frame, Failed):
        raise PartFailed(frame.call, frame.why, frame.text)
    return frame


def _check_done(call: Call, part: int, units: Sequence[int]) -> None:
    """Raise Misbehaviour if a backward ended too early.

    A backward goes from top to bottom. A unit without a gradient must be above all units that
    have one (a pooler that nobody reads).
    """
    for kept_part, unit in call.kept:
        if kept_part == part and unit < max(units, default=unit + 1):
            raise Misbehaviour(f"the cloud ends a backward without the gradient of unit {unit}")


def _check(frame: Values, shapes: Sequence[tuple[int, ...]]) -> None:
    if tuple(frame.tensor.shape) not in shapes:
        raise Misbehaviour(
            f"the cloud sent {_name(frame)} of shape {tuple(frame.tensor.shape)}; it should be"
            f" {shapes[0]}"
        )


def _name(frame: SplitFrame) -> str:
    return frame.what if isinstance(frame, Values) else type(frame).__name__
