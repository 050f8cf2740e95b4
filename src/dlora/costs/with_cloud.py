"""What the conversation with a cloud will cost: bytes down and up, round trips, by a count of every
step's frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from dlora.config.run import Config
from dlora.costs.scheduled import CHOSEN
from dlora.costs.step_frames import frames_of, hand_off_of
from dlora.data.batches import Batch, collate
from dlora.evaluate import batches_of
from dlora.lora.active import schedule_units
from dlora.run.local_round import Training
from dlora.run.prepare import Prepared
from dlora.run.scoring import scored_peers
from dlora.split.agreement import proposal_text
from dlora.split.device.body import hidden_width
from dlora.split.device.half import Half
from dlora.split.device.parts import Request
from dlora.wire.split.codec import split_num_bytes
from dlora.wire.split.frames import (
    ACTIVE,
    FIRST_VERSION,
    LEFT_OUT,
    Begin,
    Done,
    Open,
    Opened,
    SplitFrame,
    Values,
)

LINES_MBIT_S = (4, 20, 100)
_DOWN = ("input", "hidden", "update-gradient")
_BOUNDARY = ("hidden", "hidden-gradient")
_LINK = Opened(1 << 14, 1 << 6)


class Chooses(Protocol):
    """Says which units are active, step after step: a `Schedule`, or what a schedule has left in a
    log.
    """

    @property
    def active(self) -> frozenset[int]:
        """The units that are active in the next step."""

    def observe(self, scores: Mapping[int, float]) -> None:
        """A step is done."""


def split_costs(
    prepared: Prepared, own: str | None, schedules: Sequence[Chooses] | None = None
) -> dict[str, Any]:
    """What a run with a cloud sends and receives if nothing fails: for the device ``own``, with
    neighbours or without, or for a simulation of all.

    ``adapter_bytes`` is what the units cost, hand-offs among it; ``boundary_bytes``
    embedded tokens, hidden states and their gradients; both of training, both ways.
    ``scoring_bytes`` are those of all evaluations. ``schedules``: one a participant; by default the
    config's, for which all units are worth the same: what kr and probe will find is not known
    ahead, so ``about`` says that a run may move some per cent more or less.
    """
    config, half, split = prepared.config, prepared.half, prepared.config.split
    assert half is not None and split is not None
    training = Training(prepared, prepared.local_steps, 1, pooled=False)
    about = schedules is None and config.schedule.kind in CHOSEN
    if schedules is None:
        section = config.schedule
        schedules = (
            schedule_units(
                section, prepared.units, config.adapter_section, config.seed, prepared.names
            ).schedules
            if prepared.units
            else ()
        )
    names = prepared.topology.names
    held: dict[int, object] = {}  # of the link, which all participants of a simulation share
    devices = [
        _Device(half, config, held, schedules[index] if schedules else None)
        for index in range(len(prepared.names))
    ]
    # and a device with neighbours has no average before the end
    alone = own is None or not config.peers.members
    # and others' factors in it, which were never handed off
    mean = _Average(half, config, held if alone else {}, devices)
    trained, steps, tokens, round_trips = Counter[str](), 0, 0, 0
    scored = _scored(prepared, [mean] if alone else [])
    for round in range(config.train.rounds):
        for index, device in enumerate(devices):
            own_steps = training.local_steps[index]
            for micro_batches in training.batches([index], round, own_steps):
                for batch in micro_batches:
                    trained += device.bytes_of(batch, keep=True)
                    tokens += int(batch.attention_mask.sum())
                round_trips += 2 + max(0, 2 * len(device.active) - 1)
                device.step()
                steps += 1
        for device, name in zip(devices, prepared.names, strict=True):
            near = [
                names[other] for other in prepared.topology.neighbours(names.index(name), round)
            ]
            here = [
                other.in_round
                for other, its_name in zip(devices, prepared.names, strict=True)
                if its_name in near
            ]
            device.mixed(
                frozenset().union(*here) if here else device.in_round if near else frozenset()
            )
        for device in devices:
            device.in_round = frozenset()
        scored += _scored(
            prepared,
            (_scored_after if alone else _scored_by_itself)(config, round + 1, mean, devices),
        )
    opening = split_num_bytes(Open(proposal_text(half.facts, half.agreement)), split.wire)
    total = (
        Counter[str]({"up": opening, "down": split_num_bytes(_LINK, split.wire)}) + trained + scored
    )
    return {
        "wire": split.wire,
        **({"about": True} if about else {}),
        "steps": steps,
        "tokens": tokens,
        "groups": len(half.agreement.units),
        "round_trips_a_step": round_trips / steps,
        "bytes_a_step": (trained["down"] + trained["up"]) / steps,
        "adapter_bytes_a_token": trained["adapter"] / tokens,
        "adapter_bytes": trained["adapter"],
        "boundary_bytes": trained["boundary"],
        "scoring_bytes": scored["down"] + scored["up"],
        "down_bytes": total["down"],
        "up_bytes": total["up"],
        "cloud_bytes": total["down"] + total["up"],
        "seconds_on_the_line": {
            f"{line} Mbit/s": max(total["down"], total["up"]) * 8 / (line * 1e6)
            for line in LINES_MBIT_S
        },
    }


class _Device:
    """One participant's frames: which units it has killed, and which of them the cloud has been
    handed.

    ``held``: for one link, the content of each group that was sent over it last. Any object can
    stand for a content, and a different content needs a different object.
    """

    def __init__(
        self, half: Half, config: Config, held: dict[int, object], schedule: Chooses | None
    ) -> None:
        assert config.split is not None
        self.half, self.pipeline, self.held, self.schedule = (
            half,
            config.split.pipeline,
            held,
            schedule,
        )
        self.drops = config.schedule.on_kill == "drop"
        self._trained = frozenset[int]()  # units that are not zero any more
        self.in_round = frozenset[int]()  # units active in a local step of the round under way
        self._contents: dict[int, object] = {}

    @property
    def active(self) -> frozenset[int]:
        """Groups that the device is asked for."""
        return (
            frozenset(range(len(self.half.agreement.units)))
            if self.schedule is None
            else self.schedule.active
        )

    def has_trained(self, unit: int) -> bool:
        """Whether its factors have left zero."""
        return unit in self._trained

    def content(self, unit: int) -> object:
        """What its factors are now."""
        return self._contents.setdefault(unit, object())

    def step(self) -> None:
        """Count one more local step."""
        if self.schedule is not None:
            self._trained |= self.schedule.active
            self.in_round |= self.schedule.active
            self._change(self.schedule.active)
            self.schedule.observe({})

    def mixed(self, heard: frozenset[int]) -> None:
        """A round ends. What both this device and a neighbour trained in it has a new content,
        whether it was killed since or not.
        """
        self._change(self.in_round & heard)

    def _change(self, units: frozenset[int]) -> None:
        for unit in units:
            self._contents[unit] = object()

    def bytes_of(self, batch: Batch, keep: bool) -> Counter[str]:
        """The bytes of a batch on its way there and, with ``keep``, back: down and up, for adapters
        and for the boundary.
        """
        half = self.half
        mask = batch.attention_mask != 0
        half.model.body.loss_positions = half.model.inputs_for(batch.labels).get("loss_positions")
        needed, positions = (
            half.model.body.needed(mask, batch.input_ids),
            half.model.body.positions(batch.input_ids, mask),
        )
        seed = (1 << 61) + 1 if keep and half.model.body.drops else None
        request = Request(
            torch.zeros(1, 1, 1).expand(*mask.shape, 1),
            mask,
            needed,
            batch.token_type_ids,
            positions,
            seed,
            (),
        )
        widths = half.facts["embedding_width"], hidden_width(half.model.body.config)
        frames: list[SplitFrame] = []
        units = self._units(frames)
        frames += frames_of(request, half.agreement, widths, self.pipeline, keep, units)
        count = Counter[str]()
        for frame in frames:
            num_bytes = split_num_bytes(frame, half.agreement.wire)
            down = isinstance(frame, Done) or (isinstance(frame, Values) and frame.what in _DOWN)
            boundary = isinstance(frame, Begin | Done) or (
                isinstance(frame, Values) and frame.what in _BOUNDARY
            )
            count["down" if down else "up"] += num_bytes
            count["boundary" if boundary else "adapter"] += num_bytes
        return count

    def _units(self, frames: list[SplitFrame]) -> tuple[int, ...]:
        """The units of a part in the form of `Begin`; what must be handed off before is added to
        ``frames``.
        """
        half = self.half
        active = self.active
        if len(active) == len(half.agreement.units):
            return ()
        units = []
        for number in range(len(half.agreement.units)):
            if number in active:
                units.append(ACTIVE)
            elif self.drops or not self.has_trained(number):
                units.append(LEFT_OUT)
            else:
                units.append(FIRST_VERSION)
                content = self.content(number)
                if self.held.get(number) != content:
                    self.held[number] = content
                    frames.append(hand_off_of(half.agreement, number))
        return tuple(units)


class _Average(_Device):
    """What is scored of several participants: all that any has active is asked for, the rest is
    handed off.
    """

    def __init__(
        self, half: Half, config: Config, held: dict[int, object], devices: Sequence[_Device]
    ) -> None:
        super().__init__(half, config, held, None)
        self.devices = devices

    @property
    def active(self) -> frozenset[int]:
        return frozenset().union(*(device.active for device in self.devices))

    def has_trained(self, unit: int) -> bool:
        return any(device.has_trained(unit) for device in self.devices)

    def content(self, unit: int) -> object:
        contents = [device.content(unit) for device in self.devices]
        # of one participant the average is its own
        return contents[0] if len(contents) == 1 else tuple(contents)


def _scoring(prepared: Prepared) -> Iterator[Batch]:
    """The batches of one evaluation."""
    options = [option for choice in prepared.data.choices for option in choice.options]
    for rows in (prepared.data.evaluation, options):
        for chosen in batches_of(rows, prepared.config.per_device_eval_batch_size):
            yield collate([rows[index] for index in chosen], prepared.pad_token_id)


def _scored(prepared: Prepared, devices: Sequence[_Device]) -> Counter[str]:
    """One evaluation of each of these devices."""
    count = Counter[str]()
    for device in devices:
        for batch in _scoring(prepared):
            count += device.bytes_of(batch, keep=False)
    return count


def _scored_after(
    config: Config, rounds_done: int, mean: _Device, devices: Sequence[_Device]
) -> list[_Device]:
    """Who goes through the evaluation rows after so many rounds: the average, and, in the rounds
    where this is due, several peers on their own.
    """
    last = rounds_done == config.train.rounds
    own = last or _due(config.eval_peers_every, rounds_done)
    if not own and not _due(config.eval_every, rounds_done):
        return []
    chosen = scored_peers(config, len(devices)) if own and len(devices) > 1 else []
    return [mean, *(devices[peer] for peer in chosen)]


def _scored_by_itself(
    config: Config, rounds_done: int, mean: _Device, devices: Sequence[_Device]
) -> list[_Device]:
    """The same for a device with neighbours: itself during the run, itself and the average of all
    at the end.
    """
    own = [devices[peer] for peer in scored_peers(config, len(devices))]
    if rounds_done == config.train.rounds:
        return [*own, mean]
    return own if _due(config.eval_peers_every or config.eval_every, rounds_done) else []


def _due(every: int, rounds_done: int) -> bool:
    return bool(every) and rounds_done % every == 0
