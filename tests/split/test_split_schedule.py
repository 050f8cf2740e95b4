"""Laws 6 and 7 for every schedule and placement: the halves do what the whole model does, killed
units cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dlora
from dlora.config.run import Config
from dlora.config.training import TrainSection
from dlora.costs import with_cloud
from dlora.data.batches import Batch
from dlora.events.log import read_log
from dlora.lora.active import Scheduled, schedule_units
from dlora.lora.core import frame_of
from dlora.lora.factors import Factors
from dlora.lora.stacked import StackedModel
from dlora.lora.units import renamed
from dlora.programs.plan import plan
from dlora.run.prepare import prepare
from dlora.split.agreement import agree, proposal_text
from dlora.split.cloud.limits import Budget, Limits
from dlora.split.cloud.session import Session
from dlora.split.tensors import as_factors
from dlora.train import Group, forward, local_steps
from dlora.wire.frame import ChannelDown, Misbehaviour
from dlora.wire.split.codec import split_num_bytes
from dlora.wire.split.frames import ACTIVE, LEFT_OUT, Begin, Failed, HandOff, SplitFrame, Values
from kit import updates
from kit.queue_cloud import (
    QueueCloud,
    batch,
    cloud_body,
    config,
    device_half,
    factors,
    link,
    whole_model,
)

pytestmark = pytest.mark.usefixtures("no_page")

Folder = Callable[[str, str], Path]
SCHEDULES: dict[str, dict[str, Any]] = {
    "kr": {"kind": "kr", "active_fraction": 0.4, "period": 5, "warmup_steps": 6},
    "kr-drop": {
        "kind": "kr",
        "active_fraction": 0.4,
        "period": 5,
        "warmup_steps": 6,
        "on_kill": "drop",
    },
    "random": {"kind": "random", "active_fraction": 0.4, "period": 4},
    "static": {"kind": "static", "units": ["layer.1.attention.self.query"]},
    "probe": {"kind": "probe", "active_fraction": 0.4, "warmup_steps": 4},
}
CORE = {"lora.placement": "core"}


class Both:
    """A device's half beside the whole model, alike to the last bit."""

    def __init__(self, folder: Path, task: str = "classification", /, **overrides: Any) -> None:
        self.config = config(folder, task, **overrides)
        self.whole = whole_model(self.config)
        frame = self.whole.frame or None
        self.half = device_half(self.config, frame)
        self.cloud = QueueCloud(cloud_body(folder, frame))

    def scheduled(self) -> Scheduled | None:
        if self.config.schedule.kind == "all":
            return None
        groups = [renamed(group, self.half.body.prefix) for group in self.half.agreement.groups]
        return schedule_units(self.config.schedule, groups, self.config.lora, 0, ["phone"])


def train(
    model: StackedModel,
    steps: list[list[Batch]],
    scheduled: Scheduled | None,
    optimizer: str = "adamw",
) -> tuple[Tensor, Factors]:
    """Losses, and what the steps changed."""
    rate = {"adamw": 5e-3, "sgd": 0.1}[optimizer]
    section = TrainSection(optimizer=optimizer, learning_rate=rate, weight_decay=0.01)
    values = factors(model)
    before = {name: value.detach().clone() for name, value in values.items()}
    group = Group(values, 0, 1, section, scheduled)
    group.train_only(frozenset(values))
    losses = local_steps(
        model, group, steps, [rate * (1 - step / len(steps)) for step in range(len(steps))], section
    )
    return losses, {name: group.parameters[name].detach() - before[name] for name in values}


def some_steps(count: int, task: str = "classification") -> list[list[Batch]]:
    return [[batch(task, seed=100 * step % 700)] for step in range(count)]


def assert_same(
    split: tuple[Tensor, Factors], whole: tuple[Tensor, Factors], optimizer: str = "adamw"
) -> None:
    assert (split[0] - whole[0]).abs().max() < updates.LOSS_BOUND
    assert (whole[0][-1] - whole[0][0]).abs() > 1e-3  # it moved
    for part in ("lora_A", "lora_B", "lora_M", "classifier"):
        if any(part in name for name in whole[1]):
            assert (
                updates.relative_difference(split[1], whole[1], part)
                < updates.UPDATE_BOUND[optimizer]
            ), part


@pytest.mark.parametrize(
    ("schedule", "placement", "optimizer"),
    [
        ("kr", {}, "adamw"),
        pytest.param("kr", {}, "sgd", marks=pytest.mark.slow),
        ("kr-drop", {}, "adamw"),
        ("static", {}, "adamw"),
        (None, CORE, "adamw"),
        pytest.param("random", {}, "adamw", marks=pytest.mark.slow),
        pytest.param("probe", {}, "adamw", marks=pytest.mark.slow),
    ],
)
def test_split_is_unsplit(
    model_folder: Folder, schedule: str | None, placement: dict[str, Any], optimizer: str
) -> None:
    """Law 6: losses and updates of 20 steps, and who was active in each of them."""
    section = {"schedule": SCHEDULES[schedule]} if schedule else {}
    both = Both(model_folder("bert", "classification"), **section, **placement)
    link(both.half, both.cloud, 2)
    ours, theirs = both.scheduled(), both.scheduled()
    steps = some_steps(20)
    split = train(both.half.model, steps, ours, optimizer)
    assert_same(split, train(both.whole, steps, theirs, optimizer), optimizer)
    if ours is not None and theirs is not None:
        assert ours.schedules[0].state()["changed_at"] == theirs.schedules[0].state()["changed_at"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("section", [{"schedule": SCHEDULES["kr"]}, CORE], ids=["kr", "core"])
@pytest.mark.slow
def test_split_is_unsplit_for_language_models(
    model_folder: Folder, family: str, section: dict[str, Any]
) -> None:
    both = Both(model_folder(family, "causal-lm"), "causal-lm", **section)
    link(both.half, both.cloud, 3)
    steps = some_steps(12, "causal-lm")
    assert_same(
        train(both.half.model, steps, both.scheduled()), train(both.whole, steps, both.scheduled())
    )


# Law 7


class Watched:
    """The frames of a training, with the units of each call."""

    def __init__(self, both: Both) -> None:
        self.frames: list[SplitFrame] = []
        self.units: dict[int, tuple[int, ...]] = {}
        link(both.half, both.cloud, 2, seen=self._seen)

    def _seen(self, up: bool, frame: SplitFrame) -> None:
        self.frames.append(frame)
        if isinstance(frame, Begin):
            self.units[frame.call] = frame.units

    def num_bytes(self) -> int:
        return sum(split_num_bytes(frame, "float32") for frame in self.frames)


@pytest.mark.parametrize("kind", ["kr", "kr-drop", "random"])
def test_a_killed_unit_moves_no_byte(model_folder: Folder, kind: str) -> None:
    both = Both(model_folder("bert", "classification"), schedule=SCHEDULES[kind])
    watched, scheduled, killed_once = Watched(both), both.scheduled(), set()
    train(both.half.model, some_steps(20), scheduled)
    for frame in watched.frames:
        if isinstance(frame, Values) and frame.what not in ("hidden", "hidden-gradient"):
            assert watched.units[frame.call][frame.group] == ACTIVE
    for units in watched.units.values():
        killed_once |= {number for number, unit in enumerate(units) if unit != ACTIVE}
    assert len(killed_once) == len(both.half.agreement.groups)  # each had its turn to rest
    hand_offs = [frame for frame in watched.frames if isinstance(frame, HandOff)]
    # once a kill
    assert len({(frame.group, frame.version) for frame in hand_offs}) == len(hand_offs)
    if kind == "kr-drop":
        assert not hand_offs and all(
            set(units) <= {ACTIVE, LEFT_OUT} for units in watched.units.values()
        )
    else:
        assert hand_offs


def test_everything_active_is_no_kill_and_revive(model_folder: Folder) -> None:
    """The same frames, to the byte, and the same factors, to the bit."""
    plain, full = (
        Both(model_folder("bert", "classification"), **section)
        for section in (
            {},
            {"schedule": {"kind": "kr", "active_fraction": 1.0, "period": 3, "warmup_steps": 1}},
        )
    )
    watched = Watched(plain), Watched(full)
    results = [train(both.half.model, some_steps(8), both.scheduled()) for both in (plain, full)]
    assert watched[0].num_bytes() == watched[1].num_bytes()
    assert all(torch.equal(results[0][1][name], update) for name, update in results[1][1].items())


# Hand-offs


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


@pytest.mark.parametrize(
    "section", [{}, pytest.param(CORE, marks=pytest.mark.slow)], ids=["literal", "core"]
)
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

    assert both.half.body.calls is not None
    both.half.body.calls.wait = wait
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
        both.cloud.body.groups,
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
    groups = both.half.agreement.groups
    size = sum(4 * (groups[0].in_features + out) for out in groups[0].out_features)
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
        (ACTIVE,) * len(groups),
        torch.zeros(2, 64),
    )
    for number in range(6):
        session.hear(HandOff(0, 2 + number, torch.ones(1, size)))
        units = (2 + number, *begin.units[1:])
        session.hear(Begin(**vars(begin) | {"call": 1 + number, "units": units}))
    taken = session.budget.num_bytes - session.budget.free_bytes
    assert taken == 6 * (2 * both.cloud.body.bytes_a_token + 4 * size)
    session.close()
    session._threads.shutdown(wait=True)
    assert session.budget.free_bytes == session.budget.num_bytes


def test_what_no_device_hands_off_ends_the_link(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"))
    sent: list[Any] = []
    session = session_of(both, sent)
    groups = both.half.agreement.groups
    size = sum(4 * (groups[0].in_features + out) for out in groups[0].out_features)
    for frame, said in [
        (HandOff(len(groups), 2, torch.zeros(1, size)), f"group {len(groups)} of {len(groups)}"),
        (HandOff(0, 2, torch.zeros(1, size + 1)), f"{size + 1} numbers"),
    ]:
        with pytest.raises(Misbehaviour, match=said):
            session.hear(frame)
    begin = Begin(1, 0, 1, 2, b"\xc0", b"\x80", False, None, b"", (), (ACTIVE,), torch.zeros(2, 64))
    with pytest.raises(Misbehaviour, match=f"1 units for {len(groups)} groups"):
        session.hear(begin)
    units = (7, *(LEFT_OUT for _ in groups[1:]))
    session.hear(HandOff(0, 2, torch.zeros(1, size)))
    session.hear(Begin(**vars(begin) | {"units": units}))  # a version that was never handed off
    session.close()
    session._threads.shutdown(wait=True)
    assert [type(frame) for frame in sent] in ([Failed], []) and session.budget.free_bytes == 10**8


def test_hand_offs_of_one_device_stay_within_its_groups(model_folder: Folder) -> None:
    """However many come, the cloud keeps one a group."""
    both = Both(model_folder("bert", "classification"))
    session = session_of(both, [])
    groups = both.half.agreement.groups
    kept = 0
    for number, group in enumerate(groups):
        size = sum(4 * (group.in_features + out) for out in group.out_features)
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
    [group, *_] = adapter.groups
    handed = as_factors(adapter.handed_off(adapter.factors(), 0), group, 4, core=False)
    assert handed is not None
    for name, (lora_A, lora_B) in zip(group.modules, handed, strict=True):
        named = both.half.body.prefix + name
        torch.testing.assert_close(lora_A, values[f"{named}.lora_A"][0], rtol=0, atol=0)
        # alpha / r
        torch.testing.assert_close(lora_B, 2 * values[f"{named}.lora_B"][0], rtol=0, atol=0)
    assert as_factors(torch.zeros(1, 5), group, 4, core=False) is None


# The core


def test_a_core_moves_r_numbers_a_token_and_module(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"), **CORE)
    watched = Watched(both)
    train(both.half.model, some_steps(1), None)
    r = both.config.lora.r
    for frame in watched.frames:
        if isinstance(frame, Values) and frame.what not in ("hidden", "hidden-gradient"):
            assert frame.tensor.shape[1] == r * len(both.half.agreement.groups[frame.group].modules)


def test_halves_with_different_frames_do_not_agree(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"), **CORE)
    body, proposal = both.cloud.body, proposal_text(both.half.facts, both.half.agreement)

    def answer(frame: dict[str, Tensor]) -> object:
        return agree(proposal, body.facts, body.groups, frame)

    assert answer(body.frame) == both.half.agreement
    assert "this cloud has no frame" in str(answer({}))
    assert "the device has 4, the cloud's frame 3" in str(
        answer({name: tensor[:3] for name, tensor in body.frame.items()})
    )
    name = next(iter(body.frame))
    other = body.frame | {name: body.frame[name] * 1.0001}
    assert "the device's is not the cloud's; copy the cloud's file" in str(answer(other))
    some = {name: tensor for name, tensor in body.frame.items() if "query" in name}
    assert "the cloud's has no encoder.layer.0.attention.self.key" in str(answer(some))


def test_dropout_with_what_the_cloud_computes_is_refused(model_folder: Folder) -> None:
    folder = model_folder("bert", "classification")
    for section in (CORE, {"schedule": SCHEDULES["kr"]}):
        with pytest.raises(
            dlora.UserError, match="the cloud reads the inputs itself|the cloud reads inputs itself"
        ):
            config(folder, **section | {"lora.lora_dropout": 0.1})
    config(folder, **{"schedule": SCHEDULES["kr-drop"], "lora.lora_dropout": 0.1})


# Law 8, and whole runs


class Replayed:
    """Who was active in each step of a run, by its log."""

    def __init__(self, log: Path, peer: str) -> None:
        events = [
            event for event in read_log(log) if event["event"] == "active" and event["peer"] == peer
        ]
        self.sets = {event["step"]: frozenset(event["units"]) for event in events}
        self.steps_done = 0

    @property
    def active(self) -> frozenset[int]:
        return self.sets[max(step for step in self.sets if step <= self.steps_done)]

    def observe(self, scores: Any) -> None:
        self.steps_done += 1


WIRED: dict[str, Any] = {
    "peers.count": 1,
    "train.rounds": 4,
    "train.local_steps": 5,
    "eval_every": 2,
}
RUNS: dict[str, dict[str, Any]] = {
    "kr": {
        "schedule": SCHEDULES["kr"],
        "split": {"cloud": "cloud", "wire": "bfloat16", "pipeline": 2},
    },
    "drop": {"schedule": SCHEDULES["kr-drop"], "split": {"cloud": "cloud", "wire": "int8"}},
    "random": {"schedule": SCHEDULES["random"], "split": {"cloud": "cloud", "wire": "int8"}},
    "static": {"schedule": SCHEDULES["static"], "split": {"cloud": "cloud", "wire": "float32"}},
    "core": {**CORE, "split": {"cloud": "cloud", "wire": "int8"}},
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("kr", 1),
        ("core", 1),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("drop", "random", "static")),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in ("kr", "drop", "random")),
    ],
)
def test_the_plan_is_what_is_counted(
    make_config: Callable[..., Config], name: str, count: int
) -> None:
    """Law 8; for kr the plan is that of the active sets that the run has found."""
    made = make_config("bert", **{**WIRED, "peers.count": count}, **RUNS[name])
    before = plan(made)["cloud"]
    counted = dlora.simulate(made)["runs"]["dec-lora"]["cloud_bytes"]
    if "schedule" in RUNS[name]:
        again = made.model_copy(update={"output_dir": made.output_dir + "-plan"})
        log = Path(made.output_dir, "log.jsonl")
        prepared = prepare(again)
        costs = with_cloud.split_costs(
            prepared, None, [Replayed(log, peer) for peer in prepared.names]
        )
        assert counted == pytest.approx(costs["cloud_bytes"], rel=0.002)
    if name not in ("kr", "drop"):
        assert counted == pytest.approx(before["cloud_bytes"], rel=0.02)


@pytest.mark.parametrize("name", ["kr", pytest.param("drop", marks=pytest.mark.slow), "core"])
def test_a_run_over_the_wire_is_the_run_without(
    make_config: Callable[..., Config], tmp_path: Path, name: str
) -> None:
    section = {**WIRED, **RUNS[name], "split.wire": "float32"}
    wired = dlora.simulate(make_config("bert", **section))["runs"]["dec-lora"]
    section.pop("split"), section.pop("split.wire")
    local = dlora.simulate(make_config("bert", **section, output_dir=str(tmp_path / "local")))[
        "runs"
    ]["dec-lora"]
    assert wired["consensus"]["loss"] == pytest.approx(local["consensus"]["loss"], abs=1e-5)
    assert wired.get("adapter_fraction") == local.get("adapter_fraction")


def test_a_resumed_run_over_the_wire_is_the_uninterrupted_one(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    section = {**WIRED, **RUNS["kr"], "save_every": 1}
    whole = make_config("bert", **section)
    dlora.simulate(whole)
    parted = make_config("bert", **section, output_dir=str(tmp_path / "parted"))
    rounds = iter([False, True])
    with pytest.raises(dlora.Interrupted):
        dlora.simulate(parted, stop=lambda: next(rounds))
    dlora.simulate(parted, resume=True)
    adapters = [
        Path(one.output_dir, "consensus", "adapter_model.safetensors").read_bytes()
        for one in (whole, parted)
    ]
    assert adapters[0] == adapters[1]


def test_a_frame_is_found_by_its_names_in_the_body_or_around_it(model_folder: Folder) -> None:
    both = Both(model_folder("bert", "classification"), **CORE)
    layers = dict(both.whole.network.named_modules())
    names = sorted({name.rpartition(".")[0] for name in both.whole.frame})
    linears = {name: layers[name].base_layer for name in names}
    within = {name.partition(".")[2]: tensor for name, tensor in both.whole.frame.items()}
    for given in (
        both.whole.frame,
        within,
        {f"model.{name}": tensor for name, tensor in within.items()},
    ):
        found = frame_of(given, linears, 4)
        assert found.keys() == both.whole.frame.keys()
