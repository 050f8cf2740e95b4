"""The limits of a cloud: batches in parts, memory, silent devices, interrupts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dlora.errors import CloudError
from dlora.split.cloud.part import CloudPart
from dlora.split.device.calls import MAX_TRIES
from dlora.split.device.half import Half
from dlora.wire.split.frames import SplitFrame, Values
from kit.queue_cloud import LIMITS, QueueCloud, batch, factors, link
from kit.split_faults import (
    Failing,
    assert_close,
    assert_empty,
    assert_equal,
    cloud_for,
    gradients,
    small_half,
    step,
)
from kit.split_steps import loss_of

Folder = Callable[[str, str], Path]


@pytest.mark.parametrize(
    ("max_tokens", "max_parts", "pipeline"), [(10, 64, 1), (14, 64, 1), (4096, 1, 3), (4096, 2, 3)]
)
def test_a_batch_over_the_limits_goes_part_after_part(
    half: Half, max_tokens: int, max_parts: int, pipeline: int
) -> None:
    link(half, cloud_for(half))
    reference = step(half)
    cloud = cloud_for(half, limits=replace(LIMITS, max_tokens=max_tokens, max_parts=max_parts))
    calls = link(half, cloud, pipeline)
    assert_close(step(half), reference)
    assert not [event for event in cloud.told if event["event"] == "failed"] and not calls.repeated
    assert_empty(cloud)


def test_parts_go_through_again_with_their_own_dropout(model_folder: Folder) -> None:
    """Together or one after the other, a row draws what it drew."""
    half = small_half(model_folder, **{"train.model_dropout": 0.3, "lora.lora_dropout": 0.3})
    link(half, cloud_for(half), 2)
    reference = step(half)
    narrow = cloud_for(half, limits=replace(LIMITS, max_tokens=16))  # either half of the 24 tokens
    wide = cloud_for(half)
    for first, then in ((narrow, narrow), (wide, narrow), (narrow, wide)):
        clouds = iter((first, then))
        channels: list[Any] = []

        def dial(clouds: Iterator[QueueCloud] = clouds, channels: list[Any] = channels) -> Any:
            channels.append(next(clouds).dial()())
            return channels[-1]

        half.link(dial, 2, lambda seconds: None)
        half.model.network.train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            values = factors(half.model)
            half.model.use(values)
            loss = F.cross_entropy(
                half.model.network(batch().input_ids, batch().attention_mask).logits, batch().labels
            )
            channels[0].cut = True
            channels[0].session.close()
            loss.backward()
        torch.testing.assert_close(loss.detach(), reference[0][0])
        for name, gradient in reference[1].items():
            torch.testing.assert_close(values[name].grad, gradient, rtol=1e-4, atol=1e-6)


def test_two_open_calls_that_the_cloud_cannot_hold_together(half: Half) -> None:
    link(half, cloud_for(half))
    half.model.use(factors(half.model))
    (loss_of(half, batch(seed=1)) + loss_of(half, batch(seed=2))).backward()
    reference = gradients(half)
    for limits in (
        replace(LIMITS, max_tokens=30),
        replace(LIMITS, max_parts=1),
        replace(LIMITS, max_tokens=20),
    ):
        cloud = cloud_for(half, limits=limits)
        calls = link(half, cloud)
        half.model.use(factors(half.model))
        (loss_of(half, batch(seed=1)) + loss_of(half, batch(seed=2))).backward()
        torch.testing.assert_close(gradients(half), reference, rtol=1e-4, atol=1e-6)
        assert not calls.repeated
        assert_empty(cloud)


def test_one_text_over_the_limit_is_named(half: Half) -> None:
    link(half, cloud_for(half, limits=replace(LIMITS, max_tokens=8)))
    with pytest.raises(
        CloudError, match="a text of 9 tokens; the cloud takes 8 .* data.max_length"
    ):
        step(half)


def test_memory_for_less_than_the_batch_halves_it(half: Half) -> None:
    whole = cloud_for(half)
    link(half, whole)
    reference = step(half)
    need_bytes = 4 * 9 * whole.body.bytes_a_token
    cloud = cloud_for(half, memory_bytes=need_bytes // 3)
    pauses: list[float] = []
    calls = half.link(cloud.dial(), 1, pauses.append)
    assert_close(step(half), reference)
    assert calls.repeated == len(pauses) == 2  # 4 rows, 2 rows, 1 row
    assert_close(step(half), reference)
    assert len(pauses) == 2  # and it has learned
    assert_empty(cloud)


def test_no_memory_for_one_text_ends_in_an_error(half: Half) -> None:
    pauses: list[float] = []
    half.link(cloud_for(half, memory_bytes=1000).dial(), 1, pauses.append)
    with pytest.raises(
        CloudError,
        match="no room for one text of 9 tokens .*is 0.001 MB, 0.001 MB are free.* data.max_length",
    ):
        step(half)
    assert len(pauses) == MAX_TRIES and pauses == sorted(pauses) and max(pauses) == 8.0


def test_out_of_memory_inside_the_body_is_said(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = cloud_for(half)
    link(half, cloud)
    reference, plain, left = step(half), type(cloud.body).forward, [2]

    def forward(self: Any, part: CloudPart, dropout: float | None) -> torch.Tensor:
        hidden = plain(self, part, dropout)
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB\nmore lines"
            )
        return hidden

    monkeypatch.setattr(type(cloud.body), "forward", forward)
    calls = link(half, cloud)
    assert_close(step(half), reference)
    assert calls.repeated == 2
    assert [event["why"] for event in cloud.told if event["event"] == "failed"] == [
        "memory",
        "memory",
    ]
    assert_empty(cloud)


def test_a_body_that_breaks_is_an_error_at_once(
    half: Half, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = cloud_for(half)
    link(half, cloud)

    def forward(self: Any, part: CloudPart, dropout: float | None) -> torch.Tensor:
        raise RuntimeError("a fault\nof many lines")

    with monkeypatch.context() as patch:
        patch.setattr(type(cloud.body), "forward", forward)
        with pytest.raises(CloudError, match="could not run the body: RuntimeError: a fault$"):
            step(half)
    assert_empty(cloud)
    step(half)  # the session is none the worse


def test_a_silent_device_frees_its_memory_and_repeats_the_step(half: Half) -> None:
    link(half, cloud_for(half))
    reference = step(half)
    cloud = cloud_for(half, limits=replace(LIMITS, idle_s=0.1))
    silent = iter([True])

    def seen(up: bool, frame: SplitFrame) -> None:
        if (
            up
            and isinstance(frame, Values)
            and frame.what == "hidden-gradient"
            and next(silent, False)
        ):
            assert cloud.budget.free_bytes < cloud.budget.num_bytes
            assert_empty(cloud)  # waits until the cloud has given up

    calls = link(half, cloud, seen=seen)
    assert_equal(step(half), reference)
    assert calls.repeated == 1
    assert [event["why"] for event in cloud.told if event["event"] == "failed"] == ["expired"]


def test_a_cloud_that_never_waits_long_enough_is_an_error(half: Half) -> None:
    failing = Failing(half, cloud_for(half), "expired", Values, times=10**6, what="hidden-gradient")
    failing.link()
    with pytest.raises(CloudError, match="does not wait for this device .*limits.idle_s"):
        step(half)


def test_what_is_thrown_away_is_freed(half: Half) -> None:
    cloud = cloud_for(half)
    link(half, cloud)
    half.model.use(factors(half.model))
    loss = loss_of(half, batch())
    assert (
        cloud.channels[0].session.num_parts == 1
        and cloud.budget.free_bytes < cloud.budget.num_bytes
    )
    del loss  # no backward
    assert_empty(cloud)

    def fails(*arguments: Any, **keywords: Any) -> Any:
        raise KeyError("in the user's head")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half.model.network.classifier, "forward", fails)
        with contextlib.suppress(KeyError):
            loss_of(half, batch())
    gc.collect()
    assert_empty(cloud)
    kept = loss_of(half, batch())
    cloud.channels[0].session.close()
    assert_empty(cloud)
    del kept


@pytest.mark.parametrize("place", [4, 8, 14, 18])
def test_an_interrupt_in_a_step_frees_the_cloud(half: Half, place: int) -> None:
    """Ctrl-C in the midst of a forward or a backward; the model goes on working."""
    cloud, seen_frames = cloud_for(half), 0
    link(half, cloud, 2)
    reference = step(half)

    def seen(up: bool, frame: SplitFrame) -> None:
        nonlocal seen_frames
        seen_frames += 1
        if seen_frames == place:
            raise KeyboardInterrupt

    link(half, cloud, 2, seen=seen)
    with pytest.raises(KeyboardInterrupt):
        step(half)
    gc.collect()
    assert_empty(cloud)
    assert_equal(step(half), reference)


def test_garbage_in_the_midst_of_a_call_waits_for_its_end(half: Half) -> None:
    """A loss that garbage collection ends while a frame is under way must not speak in between."""
    cloud = cloud_for(half)
    sent: list[SplitFrame] = []
    thrown: list[torch.Tensor] = []

    def seen(up: bool, frame: SplitFrame) -> None:
        if up:
            sent.append(frame)
        if up and isinstance(frame, Values):
            thrown.clear()

    link(half, cloud, seen=seen)
    half.model.use(factors(half.model))
    thrown.append(loss_of(half, batch()))
    sent.clear()
    thrown.append(loss_of(half, batch()))
    kinds = [type(frame).__name__ for frame in sent]
    assert kinds == ["Begin", "Values", "Values", "Values", "Drop"]
    thrown.clear()
    assert_empty(cloud)
