"""A step through a cloud that loses its link, and what must be the same afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlora.lora.factors import Factors
from dlora.split.device.calls import Calls
from dlora.split.device.half import Half
from dlora.wire.frame import ChannelDown
from dlora.wire.split.frames import Begin, Drop, Failed, SplitFrame
from kit.queue_cloud import QueueCloud, batch, config, device_half, factors, link
from kit.split_steps import cloud_of, step_of

Folder = Callable[[str, str], Path]


def small_half(model_folder: Folder, family: str = "bert", /, **overrides: Any) -> Half:
    """Three units in a tiny model, so that a step has few frames."""
    targets = {
        "bert": r".*(query|value)$|.*1\.output\.dense",
        "llama": r".*(q_proj|v_proj)|.*1.*down_proj",
    }[family]
    made = device_half(
        config(
            model_folder(family, "classification"),
            pooling="mean",
            **{"lora.target_modules": targets} | overrides,
        )
    )
    made.own_config = config(model_folder(family, "classification"))  # type: ignore[attr-defined]
    return made


def cloud_for(half: Half, **arguments: Any) -> QueueCloud:
    return cloud_of(half.own_config, **arguments)  # type: ignore[attr-defined]


def step(half: Half, seed: int = 0, **arguments: Any) -> tuple[torch.Tensor, Factors]:
    """One step with its dropout drawn from ``seed``."""
    half.model.network.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return step_of(half.model, factors(half.model), batch(**arguments))


def assert_equal(ours: tuple[torch.Tensor, Factors], theirs: tuple[torch.Tensor, Factors]) -> None:
    """To the bit."""
    assert torch.equal(ours[0], theirs[0]) and ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(value, theirs[1][name]) for name, value in ours[1].items())


def assert_close(ours: tuple[torch.Tensor, Factors], theirs: tuple[torch.Tensor, Factors]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def assert_empty(cloud: QueueCloud) -> None:
    """No part, no token, no memory is held; the last threads may be on their way out."""
    deadline = time.monotonic() + 10
    sessions = [channel.session for channel in cloud.channels]

    def held() -> bool:
        return cloud.budget.free_bytes != cloud.budget.num_bytes or any(
            one.num_parts or one.num_tokens for one in sessions
        )

    while held() and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    assert not held()


def count_frames(half: Half, cloud: QueueCloud, pipeline: int) -> int:
    seen: list[SplitFrame] = []
    link(half, cloud, pipeline, seen=lambda up, frame: seen.append(frame))
    step(half)
    return len(seen)


def cut_at(place: int, times: int = 1) -> Callable[[bool, SplitFrame], None]:
    """Ends the link at frame number ``place``, up or down, of the first ``times`` links."""
    passed = iter(range(10**6))
    cuts = {place + round * (place + 1) for round in range(times)}

    def seen(up: bool, frame: SplitFrame) -> None:
        if next(passed) in cuts:
            raise ChannelDown

    return seen


class Failing:
    """Between the halves: the first ``times`` frames of kind ``on`` are answered with a failure
    instead.
    """

    def __init__(
        self,
        half: Half,
        cloud: QueueCloud,
        why: Any,
        on: type,
        times: int = 1,
        what: str | None = None,
    ) -> None:
        self.half, self.cloud, self.why, self.on, self.left, self.what = (
            half,
            cloud,
            why,
            on,
            times,
            what,
        )
        self.seen: Callable[[bool, SplitFrame], None] = lambda up, frame: None
        self.pauses: list[float] = []

    def link(self, pipeline: int = 1) -> Calls:
        return self.half.link(self.dial, pipeline, self.pauses.append)

    def dial(self) -> Any:
        channel = self.cloud.dial(seen=lambda up, frame: self.seen(up, frame))()
        plain = channel.send

        def send(frame: SplitFrame) -> None:
            if (
                self.left
                and isinstance(frame, self.on)
                and self.what in (None, getattr(frame, "what", None))
            ):
                self.left -= 1
                if self.on is not Begin:
                    channel.session.hear(Drop(frame.call))  # type: ignore[union-attr]
                channel.down.put(Failed(frame.call, frame.part, self.why, "as the test has it"))  # type: ignore[union-attr]
            else:
                plain(frame)

        channel.send = send  # type: ignore[method-assign]
        return channel


def gradients(half: Half) -> Factors:
    assert half.model.body.calls is not None
    adapter = half.model.body.calls.adapter
    pairs = zip(adapter.tensors, adapter.factors(), strict=True)
    return {
        f"{name}.{factor}": tensor.grad.clone()
        for (name, factor), tensor in pairs
        if tensor.grad is not None
    }
