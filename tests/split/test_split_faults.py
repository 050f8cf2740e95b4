"""Lost links between the halves and parts that fail: a repeated step is the same step, and no
thread is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dlora.split.device.half import Half
from dlora.wire.frame import ChannelDown
from dlora.wire.split.frames import Begin, Drop, Failed, SplitFrame, Values
from kit.queue_cloud import batch, factors, link
from kit.split_faults import (
    Failing,
    assert_close,
    assert_empty,
    assert_equal,
    cloud_for,
    count_frames,
    cut_at,
    gradients,
    small_half,
    step,
)
from kit.split_steps import loss_of

Folder = Callable[[str, str], Path]


# Lost links


@pytest.mark.parametrize(
    ("pipeline", "dropout"),
    [
        (1, 0.0),
        (2, None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, None), (2, 0.0), (1, 0.3), (2, 0.3))
        ),
    ],
)
def test_a_link_lost_at_any_frame_changes_nothing(
    model_folder: Folder, pipeline: int, dropout: float | None
) -> None:
    half = small_half(
        model_folder,
        **{"train.model_dropout": dropout, "lora.lora_dropout": 0.3 if dropout is None else 0.0},
    )
    cloud = cloud_for(half)
    num_frames = count_frames(half, cloud, pipeline)
    reference = step(half)
    for place in range(num_frames):
        calls = link(half, cloud, pipeline, seen=cut_at(place, times=1 + place % 2))
        assert_equal(step(half), reference)
        assert (
            len({id(channel.session) for channel in cloud.channels if channel.cut}) >= 1
            and calls.repeated <= 2
        )
    for channel in cloud.channels:
        channel.session.close()
    assert_empty(cloud)


def test_a_link_lost_in_the_word_that_follows_a_failure(half: Half) -> None:
    """The Drop after a failed part meets a dead link: the step is repeated over the next."""
    cloud = cloud_for(half)
    link(half, cloud)
    reference = step(half)
    failing = Failing(half, cloud, "memory", on=Begin)

    def seen(up: bool, frame: SplitFrame) -> None:
        if isinstance(frame, Drop):
            raise ChannelDown

    failing.seen = seen
    failing.link()
    assert_close(step(half), reference)


def test_no_new_link_ends_the_step(half: Half) -> None:
    """A dial that gives up is heard by whoever asked for the step."""

    def dial() -> Any:
        raise ChannelDown("given up")

    half.link(dial, 1, lambda seconds: None)
    with pytest.raises(ChannelDown, match="given up"):
        step(half)


@pytest.mark.parametrize("why", ["memory", "tokens", "expired"])
@pytest.mark.parametrize("what", [None, "update", "hidden-gradient", "input-gradient"])
@pytest.mark.parametrize("pipeline", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_part_that_failed_goes_through_again(
    half: Half, why: str, what: str | None, pipeline: int
) -> None:
    cloud = cloud_for(half)
    link(half, cloud, pipeline)
    reference = step(half)
    failing = Failing(half, cloud, why, Begin if what is None else Values, what=what)
    calls = failing.link(pipeline)
    assert_close(step(half), reference)
    assert calls.repeated == 1 and bool(failing.pauses) == (why != "expired")
    assert_empty(cloud)


def test_a_failure_of_another_call_is_not_lost(half: Half) -> None:
    """Two forwards are open and the first one expires while the second goes through: its backward
    repeats it.
    """
    cloud, frames = cloud_for(half), 0
    calls = link(half, cloud)
    half.model.use(factors(half.model))
    (loss_of(half, batch(seed=1)) + loss_of(half, batch(seed=2))).backward()
    reference = gradients(half)

    def seen(up: bool, frame: SplitFrame) -> None:
        nonlocal frames
        if up and isinstance(frame, Begin) and frame.call == 2:
            channel = cloud.channels[-1]
            channel.session.hear(Drop(1))
            channel.down.put(Failed(1, 0, "expired", "while the device was away"))

    calls = link(half, cloud, seen=seen)
    half.model.use(factors(half.model))
    (loss_of(half, batch(seed=1)) + loss_of(half, batch(seed=2))).backward()
    torch.testing.assert_close(gradients(half), reference)
    assert calls.repeated == 0  # it was known before anything was asked in vain
    assert_empty(cloud)


# Threads


def test_threads_end_with_the_session(half: Half) -> None:
    before = threading.active_count()
    cloud = cloud_for(half)
    link(half, cloud, 4)
    half.model.use(factors(half.model))
    loss = loss_of(half, batch())  # parts wait for its gradient
    assert threading.active_count() > before
    cloud.channels[0].session.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    assert threading.active_count() <= before
    del loss
