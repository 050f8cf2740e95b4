"""A device or a cloud that misbehaves, and halves that do not fit: one error, nothing else ends."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dlora.errors import CloudError
from dlora.split.agreement import proposal_text
from dlora.split.cloud.limits import Limits
from dlora.split.cloud.session import Session
from dlora.split.device.half import Half
from dlora.wire.frame import Misbehaviour
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
from kit.queue_cloud import QueueCloud, link
from kit.split_faults import assert_empty, cloud_for, step

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


@pytest.mark.parametrize("fault", ["what", "unit", "rows", "width", "two"])
def test_a_wrong_answer_ends_its_own_part_only(open_session: Any, half: Half, fault: str) -> None:
    session, begin, said, cloud = open_session
    for call in (200, 201):
        session.hear(replace(begin, call=call))
    until(lambda: sum(isinstance(frame, Values) for frame in said) == 2)
    unit = half.agreement.units[0]
    right = Values("update", 200, 0, 0, torch.zeros(len(begin.embedded), unit.width))
    wrong = {
        "what": replace(right, what="hidden-gradient"),
        "unit": replace(right, unit=1),
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
            isinstance(frame, Values) and frame.call == 201 and frame.unit == 1 for frame in said
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
        ("input", lambda frame: replace(frame, unit=7), "asks for unit 7 of 3"),
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
        ("update-gradient", lambda frame: Done(frame.call, 0), "without the gradient of unit 0"),
        ("update-gradient", lambda frame: replace(frame, unit=5), "never asked for"),
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
        ("protocol", 99, "protocol: the device speaks 99, the cloud 3"),
        ("groups", [[["encoder.nothing"], 64, [64], [4]]], "encoder.nothing is not in the body"),
        ("groups", [[["encoder.nothing"], 64, [64], [4, 4]]], "the device's manifest is none"),
        *(
            ("groups", [[["encoder.nothing"], 64, [64], [r]]], f"ranks .*{r}.*: not known here")
            for r in (0, 1 << 13, 0.5, "4")
        ),
        ("wire", "float8", "wire float8"),
        ("dropout", 1.5, "dropout 1.5"),
        ("activation", "tanh", "activation tanh: not known here"),
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
    assert [event["event"] for event in cloud.told] == ["refused"]


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", "null", '{"protocol": 3, "wire": [], "dropout": null, "groups": 7}'],
)
def test_a_manifest_that_is_none_is_refused(half: Half, manifest: str) -> None:
    cloud = cloud_for(half)
    link(half, cloud).manifest = manifest
    with pytest.raises(CloudError, match="the device's manifest is none"):
        step(half)
