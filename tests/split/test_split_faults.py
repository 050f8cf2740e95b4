"""What goes wrong between the halves: lost links, full clouds, silence, nonsense; a repeated step
is the same step.
"""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dlora.errors import CloudError
from dlora.lora.factors import Factors
from dlora.split.agreement import proposal_text
from dlora.split.cloud.dropout import SeededDropout
from dlora.split.cloud.limits import Limits
from dlora.split.cloud.part import CloudPart
from dlora.split.cloud.session import Session
from dlora.split.device.calls import MAX_TRIES, Calls
from dlora.split.device.half import Half
from dlora.wire.frame import ChannelDown, Misbehaviour
from dlora.wire.split.frames import (
    Begin,
    Done,
    Drop,
    Failed,
    Open,
    Opened,
    Refused,
    SplitFrame,
    Values,
)
from kit.queue_cloud import LIMITS, QueueCloud, batch, config, device_half, factors, link
from kit.split_steps import cloud_of, loss_of, step_of

Folder = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def half(model_folder: Folder) -> Half:
    return small_half(model_folder)


def small_half(model_folder: Folder, family: str = "bert", /, **overrides: Any) -> Half:
    """Three groups in a tiny model, so that a step has few frames."""
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


def gradients(half: Half) -> Factors:
    pairs = zip(half.body.calls.adapter.tensors, half.body.calls.adapter.factors(), strict=True)  # type: ignore[union-attr]
    return {
        f"{name}.{factor}": tensor.grad.clone()
        for (name, factor), tensor in pairs
        if tensor.grad is not None
    }


# Dropout


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_dropout_is_drawn_anew_each_forward_and_never_in_evaluation(
    model_folder: Folder, family: str, attention: str
) -> None:
    half = small_half(model_folder, family, **{"train.model_dropout": 0.3})
    cloud = cloud_for(half)
    body = cloud.body
    for network in (body.network, body._training):
        network.set_attn_implementation(attention)
    try:
        link(half, cloud, 2)
        half.model.use(factors(half.model))
        half.model.network.train()
        one, other = loss_of(half, batch()), loss_of(half, batch())
        assert one.item() != other.item()
        assert_equal(step(half, seed=3), step(half, seed=3))
        assert not torch.equal(step(half, seed=3)[0], step(half, seed=4)[0])
        assert step(half, seed=3)[0].isfinite().all()
        half.model.network.eval()
        assert loss_of(half, batch()).item() == loss_of(half, batch()).item()
    finally:
        for network in (body.network, body._training):
            network.set_attn_implementation("sdpa")


def test_seeded_dropout_has_torchs_rate_and_mean() -> None:
    x = torch.ones(200, 200)
    with SeededDropout(torch.Generator().manual_seed(0), None):
        dropped = F.dropout(x, 0.3)
        assert torch.equal(F.dropout(x, 0.3, training=False), x)
    assert abs((dropped == 0).float().mean() - 0.3) < 0.01 and abs(dropped.mean() - 1) < 0.02
    with SeededDropout(torch.Generator().manual_seed(0), 0.5):
        # the device's rate, not the model's
        assert abs((torch.nn.Dropout(0.1)(x) == 0).float().mean() - 0.5) < 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_seeded_attention_is_torchs(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    seen = torch.rand(2, 1, 5, 5, generator=generator) > 0.4
    seen[..., 0] = True
    arguments: dict[str, Any] = {"is_causal": True} if causal else {"attn_mask": seen}
    plain = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **arguments)
    with SeededDropout(torch.Generator().manual_seed(0), None):
        torch.testing.assert_close(
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **arguments), plain
        )
        draws = [
            F.scaled_dot_product_attention(
                query, key, value, enable_gqa=True, dropout_p=0.3, **arguments
            )
            for _ in range(2000)
        ]
    mean = torch.stack(draws).mean(0)
    assert not torch.equal(draws[0], draws[1]) and (mean - plain).abs().max() < 0.15
    blind = torch.zeros(2, 1, 5, 5, dtype=torch.bool)  # padding on the left sees nothing at all
    with SeededDropout(torch.Generator().manual_seed(0), None):
        assert (
            F.scaled_dot_product_attention(query, key, value, attn_mask=blind, enable_gqa=True)
            .isfinite()
            .all()
        )


# Limits


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
    assert not [event for event, _ in cloud.told if event == "failed"] and not calls.repeated
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
    assert [fields["why"] for event, fields in cloud.told if event == "failed"] == [
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
    assert [fields["why"] for event, fields in cloud.told if event == "failed"] == ["expired"]


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


# A device that misbehaves


@pytest.fixture
def open_session(half: Half) -> Iterator[tuple[Session, Begin, list[SplitFrame], QueueCloud]]:
    """A session that has agreed, a fitting Begin, and what the session sent."""
    cloud = cloud_for(half, limits=Limits(max_tokens=64, max_parts=4, idle_s=20.0))
    seen: list[SplitFrame] = []
    link(half, cloud, seen=lambda up, frame: seen.append(frame))
    step(half)
    begin = next(frame for frame in seen if isinstance(frame, Begin))
    said: list[SplitFrame] = []
    session = Session("phone", cloud.body, cloud.limits, cloud.budget, said.append, cloud.tell)
    session.hear(Open(proposal_text(half.facts, half.agreement)))
    yield session, begin, said, cloud
    session.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


def test_what_no_device_says_ends_the_link(open_session: Any, half: Half) -> None:
    session, begin, said, cloud = open_session
    fresh = Session("phone", cloud.body, cloud.limits, cloud.budget, said.append)
    zeros = torch.zeros(2, 64)
    for frame in (begin, Drop(1), Values("update", 1, 0, 0, zeros)):
        with pytest.raises(Misbehaviour, match="before Open"):
            fresh.hear(frame)
    fresh.close()
    session.hear(replace(begin, call=100))
    nonsense: list[SplitFrame] = [
        Open(proposal_text(half.facts, half.agreement)),
        replace(begin, call=100),  # twice
        replace(begin, call=101, embedded=torch.zeros(len(begin.embedded), 63)),
        *(Values(what, 100, 0, 0, zeros) for what in ("input", "hidden", "update-gradient")),
        Opened(1, 1), Refused("no"), Done(100, 0), Failed(100, 0, "memory", "no"),
    ]  # fmt: skip
    for frame in nonsense:
        with pytest.raises(ValueError):
            session.hear(frame)
    until(lambda: any(isinstance(frame, Values) and frame.call == 100 for frame in said))
    assert session.num_parts == 1  # what was under way still is
    session.hear(Drop(100))
    assert_empty(cloud)


def test_a_device_that_takes_no_answers_loses_its_link(open_session: Any, half: Half) -> None:
    _, begin, _, cloud = open_session
    taken = threading.Event()

    def waits(_: SplitFrame) -> None:
        taken.wait(10)

    session = Session("phone", cloud.body, cloud.limits, cloud.budget, waits, cloud.tell)
    session.hear(Open(proposal_text(half.facts, half.agreement)))  # the first answer
    many = replace(begin, embedded=torch.zeros(cloud.limits.max_tokens + 1, 64))
    for call in range(cloud.limits.max_parts):
        session.hear(replace(many, call=call))
    with pytest.raises(Misbehaviour, match="5 answers are waiting to be taken"):
        session.hear(replace(many, call=99))
    taken.set()
    session.close()


@pytest.mark.parametrize("fault", ["what", "group", "rows", "width", "two"])
def test_a_wrong_answer_ends_its_own_part_only(open_session: Any, half: Half, fault: str) -> None:
    session, begin, said, cloud = open_session
    for call in (200, 201):
        session.hear(replace(begin, call=call))
    until(lambda: sum(isinstance(frame, Values) for frame in said) == 2)
    group = half.agreement.groups[0]
    right = Values("update", 200, 0, 0, torch.zeros(len(begin.embedded), group.width))
    wrong = {
        "what": replace(right, what="hidden-gradient"),
        "group": replace(right, group=1),
        "rows": replace(right, tensor=right.tensor[1:]),
        "width": replace(right, tensor=right.tensor[:, 1:]),
        "two": right,
    }[fault]
    if fault == "two":
        with pytest.raises(Misbehaviour, match="has not taken"):
            for _ in range(100):
                session.hear(right)
    else:
        session.hear(wrong)
        until(lambda: any(isinstance(frame, Failed) for frame in said))
        failed = next(frame for frame in said if isinstance(frame, Failed))
        assert (failed.call, failed.why) == (200, "broken") and "was due" in failed.text
    session.hear(replace(right, call=201))
    until(
        lambda: any(
            isinstance(frame, Values) and frame.call == 201 and frame.group == 1 for frame in said
        )
    )
    session.hear(Drop(200))
    session.hear(Drop(201))
    session.hear(replace(right, call=201))  # crossed with the end of its part
    assert_empty(cloud)


def test_what_would_stop_a_gpu_is_refused_before_it_gets_there(open_session: Any) -> None:
    session, begin, said, cloud = open_session
    tokens = len(begin.embedded)
    session.hear(replace(begin, call=300, positions=(*range(tokens - 1), 512)))
    session.hear(replace(begin, call=301, token_types=bytes([2] * tokens)))
    until(lambda: sum(isinstance(frame, Failed) for frame in said) == 2)
    assert {(frame.why, frame.text) for frame in said if isinstance(frame, Failed)} == {
        ("broken", "a position of 512; 512 are known"),
        ("broken", "a token type of 2; 2 are known"),
    }
    assert_empty(cloud)


def test_a_flood_is_bounded(open_session: Any) -> None:
    session, begin, said, cloud = open_session
    before = threading.active_count()
    for call in range(400, 600):
        try:
            session.hear(replace(begin, call=call))
        except Misbehaviour as error:  # answers that nobody takes are not heaped up: the link ends
            assert "answers are waiting" in str(error)
        if call % 2:
            session.hear(Drop(call))
        assert session.num_tokens <= 64 and session.num_parts <= 4
        assert threading.active_count() <= before + 5
    for call in range(400, 600):
        session.hear(Drop(call))
    assert_empty(cloud)
    session.close()
    session.hear(replace(begin, call=1000))  # crossed with the end
    assert_empty(cloud)


# A cloud that misbehaves


class Liar:
    """A link whose cloud says ``lie(frame)`` in place of each frame that it sends."""

    def __init__(self, channel: Any, lie: Callable[[SplitFrame], SplitFrame | Exception]) -> None:
        self.channel, self.lie, self.send = channel, lie, channel.send

    def receive(self) -> SplitFrame:
        said = self.lie(self.channel.receive())
        if isinstance(said, Exception):
            raise said
        return said


@pytest.mark.parametrize(
    ("truth", "lie", "message"),
    [
        ("input", lambda frame: replace(frame, group=7), "asks for group 7 of 3"),
        (
            "input",
            lambda frame: replace(frame, tensor=frame.tensor[:, 1:]),
            r"input of shape \(24, 63\)",
        ),
        ("input", lambda frame: replace(frame, tensor=frame.tensor[1:]), "input of shape"),
        ("input", lambda frame: replace(frame, part=3), "part 3 of 1"),
        (
            "input",
            lambda frame: replace(frame, what="update-gradient"),
            "update-gradient in a forward",
        ),
        ("input", lambda frame: Refused("later"), "Refused in a step"),
        ("input", lambda frame: Done(frame.call, 0), "Done in a forward"),
        ("input", lambda frame: ValueError("Values frame: not finite"), "not finite"),
        ("hidden", lambda frame: replace(frame, tensor=frame.tensor[1:]), "hidden of shape"),
        ("update-gradient", lambda frame: Done(frame.call, 0), "without the gradient of group 0"),
        ("update-gradient", lambda frame: replace(frame, group=5), "never asked for"),
        (
            "update-gradient",
            lambda frame: replace(frame, tensor=frame.tensor[1:]),
            "update-gradient of shape",
        ),
        ("update-gradient", lambda frame: replace(frame, what="hidden"), "hidden in a backward"),
    ],
)
def test_a_cloud_that_lies_ends_in_an_error(half: Half, truth: str, lie: Any, message: str) -> None:
    cloud = cloud_for(half)
    lies = iter([lie])

    def tell(frame: SplitFrame) -> SplitFrame:
        if isinstance(frame, Values) and frame.what == truth:
            told: SplitFrame = next(lies, lambda frame: frame)(frame)
            return told
        return frame

    half.link(lambda: Liar(cloud.dial()(), tell), 1, lambda seconds: None)
    with pytest.raises(CloudError, match=message):
        step(half)
    gc.collect()
    assert_empty(cloud)  # the cloud was told that nothing more comes
    link(half, cloud_for(half))
    step(half)


# Halves that do not fit


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 128, "hidden_size: the device has 128, the cloud 64"),
        ("vocabulary", 99, "vocabulary: the device has 99, the cloud 20"),
        ("embedding", "0" * 64, f"embedding: the device has {'0' * 64}, the cloud [0-9a-f]{{64}}"),
        ("model", "llama", "model: the device has llama, the cloud bert"),
        ("protocol", 99, "protocol: the device speaks 99, the cloud 2"),
        ("groups", [[["encoder.nothing"], 64, [64]]], "encoder.nothing is not in the body"),
        ("wire", "float8", "wire float8"),
        ("dropout", 1.5, "dropout 1.5"),
    ],
)
def test_halves_that_do_not_fit_are_told_why(
    half: Half, key: str, value: Any, message: str
) -> None:
    cloud = cloud_for(half)
    calls = link(half, cloud)
    calls.manifest = json.dumps(json.loads(calls.manifest) | {key: value})
    with pytest.raises(CloudError, match=message):
        step(half)
    assert [event for event, _ in cloud.told] == ["refused"]


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", "null", '{"protocol": 1, "wire": [], "dropout": null, "groups": 7}'],
)
def test_a_manifest_that_is_none_is_refused(half: Half, manifest: str) -> None:
    cloud = cloud_for(half)
    link(half, cloud).manifest = manifest
    with pytest.raises(CloudError, match="the device's manifest is none"):
        step(half)
