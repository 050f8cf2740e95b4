"""Cloud and device killed, frozen, interrupted at any byte of a step: the run ends with the very
same factors.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from dlora.programs.cloud import LOOK_S
from kit.processes import HUB, Split, running, until
from kit.relay import Relay

ModelFolder = Callable[..., Path]
# Dropout in both halves: what is done again must draw the same.
CHANGES = {
    "train.model_dropout": 0.1, "split.pipeline": 2, "save_every": 1,
    "schedule": {"kind": "kr", "active_fraction": 0.4, "period": 2, "warmup_steps": 3},
}  # fmt: skip


@pytest.fixture
def relay() -> Iterator[Relay]:
    with Relay() as made:
        yield made


def split_over(relay: Relay, folder: Path, model: Path, **more: object) -> Split:
    arguments = {"changes": CHANGES, "dialled": relay.address, **more}
    split = Split(folder, model, **arguments)  # type: ignore[arg-type]
    relay.to(split.address)
    return split


class Undisturbed:
    """What a run of CHANGES ends with, and the bytes on its line by the end of each round."""

    def __init__(self, folder: Path, model: Path) -> None:
        with Relay() as relay, running(split_over(relay, folder, model)) as split:
            split.start_hub()
            split.start("phone")
            outcome = split.finish("phone")
            assert (outcome.exit_code, outcome.err) == (0, ""), outcome
            self.adapter, self.passed = split.adapter("phone"), relay.passed
            self.rounds = split.events("phone", "round")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), model_folder("bert"))


def assert_undisturbed(split: Split, undisturbed: Undisturbed) -> None:
    """The factors to the last bit, and every round once."""
    assert split.adapter("phone") == undisturbed.adapter
    rounds = split.events("phone", "round")
    assert [(event["round"], event["loss"]) for event in rounds] == [
        (event["round"], event["loss"]) for event in undisturbed.rounds
    ]


def cloud_killed_at(
    share: float, folder: Path, model: Path, relay: Relay, undisturbed: Undisturbed
) -> Split:
    """Killed when that share of the bytes has passed, and started again; nobody touches the
    device.
    """
    with running(split_over(relay, folder, model)) as split:
        split.start_hub()
        relay.at(int(share * undisturbed.passed), lambda: split.kill(HUB))
        split.start("phone")
        until(lambda: relay.has_acted, "the moment")
        split.start_hub()
        outcome = split.finish("phone")
    assert (outcome.exit_code, outcome.err) == (0, ""), outcome
    assert_undisturbed(split, undisturbed)
    return split


@pytest.mark.slow  # test_split_faults.py breaks the same step in one process
def test_a_cloud_killed_in_a_step_and_started_again(
    tmp_path: Path, model_folder: ModelFolder, relay: Relay, undisturbed: Undisturbed
) -> None:
    split = cloud_killed_at(0.5, tmp_path, model_folder("bert"), relay, undisturbed)
    [lost] = split.events("phone", "cloud-lost")
    assert lost["reason"] == "the link has ended; what was under way is done again"
    rounds = [event["time"] < lost["time"] for event in split.events("phone", "round")]
    # within the training
    assert rounds == sorted(rounds, reverse=True) and 0 < sum(rounds) < len(rounds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "share", [0.002, 0.02, 0.05, 0.2, 0.3, 0.37, 0.43, 0.55, 0.6, 0.7, 0.8, 0.9, 0.97]
)
def test_a_cloud_killed_at_any_moment(
    tmp_path: Path, model_folder: ModelFolder, relay: Relay, undisturbed: Undisturbed, share: float
) -> None:
    cloud_killed_at(share, tmp_path, model_folder("bert"), relay, undisturbed)


@pytest.mark.slow
def test_a_device_that_waits_is_interrupted_killed_and_goes_on(
    tmp_path: Path, model_folder: ModelFolder, relay: Relay, undisturbed: Undisturbed
) -> None:
    with running(split_over(relay, tmp_path, model_folder("bert"))) as split:
        split.start("phone")  # no cloud yet
        until(lambda: split.events("phone", "start"), "the device to wait")
        split.signal("phone", signal.SIGINT)
        outcome = split.finish("phone")
        assert (outcome.exit_code, outcome.out) == (4, "")
        assert (
            "phone stopped while its cloud was away; what was saved stands; go on with: dlora"
            " device" in outcome.err
        )

        split.start("phone", "--resume")
        relay.at(int(0.4 * undisturbed.passed), lambda: split.kill("phone"))
        split.start_hub()
        until(lambda: relay.has_acted, "the device to be killed")
        assert 0 < split.rounds_done("phone") < 4

        relay.at(
            relay.passed + int(0.2 * undisturbed.passed),
            lambda: split.signal("phone", signal.SIGINT),
        )
        split.start("phone", "--resume")
        outcome = split.finish("phone")
        assert (
            outcome.exit_code == 4 and "finished and saved; go on with: dlora device" in outcome.err
        ), outcome
        assert 0 < split.rounds_done("phone") < 4

        split.start("phone", "--resume")
        outcome = split.finish("phone")
        assert (outcome.exit_code, outcome.err) == (0, ""), outcome
        split.signal(HUB, signal.SIGINT)
        outcome = split.finish(HUB)
        assert outcome.exit_code == 0 and outcome.out.startswith("served "), outcome
    assert_undisturbed(split, undisturbed)
    assert split.events("phone", "cloud-lost") == []


@pytest.mark.slow
def test_a_frozen_device_frees_the_cloud_and_holds_up_nobody(
    tmp_path: Path, model_folder: ModelFolder, relay: Relay, undisturbed: Undisturbed
) -> None:
    """SIGSTOP in a step for longer than limits.idle_s, while another device runs from start to
    end.
    """
    more = {"devices": ("phone", "tablet"), "cloud": {"limits.idle_s": 2.0}}
    with running(split_over(relay, tmp_path, model_folder("bert"), **more)) as split:
        split.start_hub()
        split.start("phone")
        in_flight, frozen = 'dlora_tokens_in_flight{device="phone"}', False
        while not frozen:  # else it was after a step's last answer
            relay.at(
                relay.passed + undisturbed.passed // 3,
                partial(split.signal, "phone", signal.SIGSTOP),
            )
            until(lambda: relay.has_acted and split.is_stopped("phone"), "the device to stop")
            since = time.monotonic()
            looked = partial(lambda since: time.monotonic() - since > 2 * LOOK_S, since)
            until(looked, "the cloud to look twice")
            frozen = split.scraped()[in_flight] > 0
            if not frozen:
                split.signal("phone", signal.SIGCONT)
        split.start("tablet")
        until(lambda: split.scraped()[in_flight] == 0, "the cloud to forget them")
        assert split.scraped()['dlora_failures_total{device="phone",why="expired"}'] > 0
        outcome = split.finish("tablet")
        assert (outcome.exit_code, outcome.err) == (0, ""), outcome
        assert split.is_stopped("phone")
        split.signal("phone", signal.SIGCONT)
        outcome = split.finish("phone")
        assert (outcome.exit_code, outcome.err) == (0, ""), outcome
    assert_undisturbed(split, undisturbed)


@pytest.mark.slow
# of shorter and longer than gRPC waits for a sign of life
@pytest.mark.parametrize("frozen_s", [3.0, 45.0])
def test_a_frozen_cloud_is_waited_for(
    tmp_path: Path,
    model_folder: ModelFolder,
    relay: Relay,
    undisturbed: Undisturbed,
    frozen_s: float,
) -> None:
    with running(split_over(relay, tmp_path, model_folder("bert"))) as split:
        split.start_hub()
        relay.at(undisturbed.passed // 2, lambda: split.signal(HUB, signal.SIGSTOP))
        split.start("phone")
        until(lambda: relay.has_acted and split.is_stopped(HUB), "the cloud to stop")
        since = time.monotonic()
        until(lambda: time.monotonic() - since > frozen_s, "the time to pass")
        assert split.processes["phone"].is_alive()
        split.signal(HUB, signal.SIGCONT)
        outcome = split.finish("phone")
        assert (outcome.exit_code, outcome.err) == (0, ""), outcome
    assert len(split.events("phone", "cloud-lost")) == (frozen_s > 30)
    assert_undisturbed(split, undisturbed)


@pytest.mark.slow
def test_a_cloud_that_comes_back_with_another_model(
    tmp_path: Path, model_folder: ModelFolder, relay: Relay, undisturbed: Undisturbed
) -> None:
    """The device says what differs and ends; with the right cloud it goes on."""
    with running(split_over(relay, tmp_path, model_folder("bert"))) as split:
        split.start_hub()
        relay.at(undisturbed.passed // 2, lambda: split.kill(HUB))
        split.start("phone")
        until(lambda: relay.has_acted, "the moment")
        split.start_hub("--set", f"model={model_folder('roberta')}")
        outcome = split.finish("phone")
        said = (
            "error: the cloud refuses this device: model: the device has bert, the cloud roberta;"
            " both need the same model\n"
        )
        assert outcome == (3, "", said)
        done = split.rounds_done("phone")
        assert 0 < done < 4  # what was trained stays
        split.kill(HUB)
        split.start_hub()
        split.start("phone", "--resume")
        outcome = split.finish("phone")
        assert (outcome.exit_code, outcome.err) == (0, ""), outcome
        assert [event["rounds_done"] for event in split.events("phone", "resumed")] == [done]
    assert_undisturbed(split, undisturbed)
