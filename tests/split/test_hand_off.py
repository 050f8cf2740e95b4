"""Killed units: what the cloud is handed, again after a lost link, and what no device hands off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlora.lora.factors import Factors
from dlora.split.agreement import agree, proposal_text
from dlora.split.cloud.handed_off import HandedOff, HandOffs
from dlora.split.cloud.limits import Budget, Limits
from dlora.split.cloud.session import Session
from dlora.split.tensors import as_factors
from dlora.train import forward
from dlora.wire.frame import ChannelDown, Misbehaviour
from dlora.wire.split.frames import ACTIVE, LEFT_OUT, Begin, Failed, HandOff, SplitFrame
from kit.both_halves import CORE, Both
from kit.queue_cloud import batch, factors, link

pytestmark = pytest.mark.usefixtures("no_page")
Folder = Callable[[str, str], Path]


def one_step(both: Both, units: dict[str, Any] | None = None) -> tuple[Tensor, Factors]:
    """Loss and gradients of one batch under the killed units that are set."""
    both.half.model.use(
        values := factors(both.half.model), frozenset((units or {}).get("killed", ()))
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = batch()
        loss = torch.nn.functional.cross_entropy(forward(both.half.model, made), made.labels)
        loss.backward()
    return loss.detach(), {
        name: tensor.grad for name, tensor in values.items() if tensor.grad is not None
    }


def cut_at(place: int) -> Callable[[bool, SplitFrame], None]:
    passed = iter(range(10**6))

    def seen(up: bool, frame: SplitFrame) -> None:
        if next(passed) == place:
            raise ChannelDown

    return seen


@pytest.mark.slow
@pytest.mark.parametrize("section", [{}, CORE], ids=["literal", "core"])
def test_a_link_lost_at_any_frame_hands_off_again(
    model_folder: Folder, section: dict[str, Any]
) -> None:
    both = Both(model_folder("bert", "classification"), **section)
    killed, frames = {"killed": [0, 2, 5]}, []
    link(both.half, both.cloud, 2, seen=lambda up, frame: frames.append(frame))
    loss, gradients = one_step(both, killed)
    assert sum(isinstance(frame, HandOff) for frame in frames) == 3
    for place in range(len(frames)):
        link(both.half, both.cloud, 2, seen=cut_at(place))
        again, found = one_step(both, killed)
        assert torch.equal(again, loss) and found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())
    for channel in both.cloud.channels:
        channel.session.close()
    assert both.cloud.budget.free_bytes == both.cloud.budget.num_bytes


def test_a_cloud_without_room_for_a_hand_off_is_asked_again(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"))
    link(both.half, both.cloud, 1)
    loss, _ = one_step(both, {"killed": [0, 1]})
    pauses: list[float] = []
    both.half.link(both.cloud.dial(), 1, pauses.append)
    taken = both.cloud.budget.free_bytes - 1000
    assert both.cloud.budget.take("another", taken)

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        both.cloud.budget.give_back("another", taken)

    assert both.half.model.body.calls is not None
    both.half.model.body.calls.wait = wait
    again, _ = one_step(both, {"killed": [0, 1]})
    torch.testing.assert_close(again, loss)
    assert len(pauses) == 1


def session_of(both: Both, sent: list[SplitFrame], memory_bytes: int = 10**8) -> Session:
    session = Session(
        "phone", both.cloud.body, Limits(4096, 8, 20.0), Budget(memory_bytes), sent.append
    )
    agreed = agree(
        proposal_text(both.half.facts, both.half.agreement),
        both.cloud.body.facts,
        both.cloud.body.units,
        {},
    )
    assert not isinstance(agreed, str)
    session.agreement = agreed
    return session


def test_versions_that_parts_still_use_are_counted(model_folder: Folder) -> None:
    """Each part under way keeps the version that it began with; the budget knows of all of them
    until the parts end.
    """
    both = Both(model_folder("bert", "classification"))
    session = session_of(both, [])
    units = both.half.agreement.units
    size = sum(4 * (units[0].in_features + out) for out in units[0].out_features)
    begin = Begin(
        1,
        0,
        1,
        2,
        b"\xc0",
        b"\x80",
        True,
        None,
        b"",
        (),
        (ACTIVE,) * len(units),
        torch.zeros(2, 64),
    )
    for number in range(6):
        session.hear(HandOff(0, 2 + number, torch.ones(1, size)))
        states = (2 + number, *begin.units[1:])
        session.hear(Begin(**vars(begin) | {"call": 1 + number, "units": states}))
    taken = session.budget.num_bytes - session.budget.free_bytes
    assert taken == 6 * (2 * both.cloud.body.bytes_a_token + 4 * size)
    session.close()
    session._threads.shutdown(wait=True)
    assert session.budget.free_bytes == session.budget.num_bytes


def test_what_no_device_hands_off_ends_the_link(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"))
    sent: list[Any] = []
    session = session_of(both, sent)
    units = both.half.agreement.units
    size = sum(4 * (units[0].in_features + out) for out in units[0].out_features)
    for frame, said in [
        (HandOff(len(units), 2, torch.zeros(1, size)), f"unit {len(units)} of {len(units)}"),
        (HandOff(0, 2, torch.zeros(1, size + 1)), f"{size + 1} numbers"),
    ]:
        with pytest.raises(Misbehaviour, match=said):
            session.hear(frame)
    begin = Begin(1, 0, 1, 2, b"\xc0", b"\x80", False, None, b"", (), (ACTIVE,), torch.zeros(2, 64))
    with pytest.raises(Misbehaviour, match=f"lists 1 units, {len(units)} were agreed"):
        session.hear(begin)
    states = (7, *(LEFT_OUT for _ in units[1:]))
    session.hear(HandOff(0, 2, torch.zeros(1, size)))
    session.hear(Begin(**vars(begin) | {"units": states}))  # a version that was never handed off
    session.close()
    session._threads.shutdown(wait=True)
    assert [type(frame) for frame in sent] in ([Failed], []) and session.budget.free_bytes == 10**8


def test_hand_offs_of_one_device_stay_within_its_units(model_folder: Folder) -> None:
    """However many come, the cloud keeps one a unit."""
    both = Both(model_folder("bert", "classification"))
    session = session_of(both, [])
    units = both.half.agreement.units
    kept = 0
    for number, unit in enumerate(units):
        size = sum(4 * (unit.in_features + out) for out in unit.out_features)
        kept += 4 * size
        for version in range(2, 9):
            session.hear(HandOff(number, version, torch.zeros(1, size)))
    assert session.budget.num_bytes - session.budget.free_bytes == kept
    session.close()
    assert session.budget.free_bytes == session.budget.num_bytes


def test_what_is_handed_off_is_what_was_trained(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"))
    adapter = link(both.half, both.cloud).adapter
    both.half.model.use(values := factors(both.half.model))
    [unit, *_], agreement = adapter.units, both.half.agreement
    handed = as_factors(adapter.handed_off(adapter.factors(), 0), unit, agreement)
    assert handed is not None
    for name, (lora_A, lora_B) in zip(unit.modules, handed, strict=True):
        named = both.half.model.body.prefix + name
        torch.testing.assert_close(lora_A, values[f"{named}.lora_A"][0], rtol=0, atol=0)
        # alpha / r
        torch.testing.assert_close(lora_B, 2 * values[f"{named}.lora_B"][0], rtol=0, atol=0)
    assert as_factors(torch.zeros(1, 5), unit, agreement) is None


def test_factors_without_room_are_not_kept_and_the_cloud_goes_on() -> None:
    """A part that needs them fails with "memory"; the session that was handed them does not."""
    kept = HandOffs("phone", Budget(100))
    kept.keep(0, HandedOff(1, [[torch.zeros(10)]]))
    kept.keep(1, HandedOff(1, [[torch.zeros(1000)]]))  # more than the cloud has
    kept.keep(0, HandedOff(2, [[torch.zeros(20)]]))
    assert kept.budget.free_bytes == 100 - 20 * 4
    kept.clear()
    assert kept.budget.free_bytes == 100
