"""Both systems at once: devices that lean on a cloud for the frozen model and agree with their
neighbours without it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dlora
from dlora.show.words import bytes_text
from kit.both_devices import ATTIC, DEVICES, Both
from kit.call_cli import Outcome, call
from kit.processes import HUB, running, until
from kit.relay import Relay
from kit.updates import UPDATE_BOUND, assert_same, relative_difference, update_of

pytestmark = pytest.mark.slow
ModelFolder = Callable[..., Path]


class Undisturbed(NamedTuple):
    """A run of both devices through one cloud, its simulation, and what was planned for each."""

    both: Both
    outcomes: dict[str, Outcome]
    simulated: Path
    plans: dict[str, Outcome]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder
) -> Iterator[Undisturbed]:
    both = Both(tmp_path_factory.mktemp("both"), model_folder("bert"))
    with running(both):
        both.start_hub()
        both.start_all()
        config = both.config("phone", {"output_dir": str(both.folder / "runs" / "simulation")})
        dlora.simulate(config)
        plans = {}
        for name in DEVICES:
            both.config(name).dump()
            plans[name] = call("plan", both.folder / f"{name}.yaml", "--name", name, "--json")
        yield Undisturbed(both, both.finish_all(), Path(config.output_dir), plans)


def test_devices_with_neighbours_end_where_their_simulation_ends(undisturbed: Undisturbed) -> None:
    """Law 5 for both axes: each device's own factors and the average, A, B and the head apart."""
    both, config = undisturbed.both, undisturbed.both.config("phone")
    assert {
        name: (said.exit_code, said.err) for name, said in undisturbed.outcomes.items()
    } == dict.fromkeys(DEVICES, (0, ""))
    for name in DEVICES:
        for adapter in (f"peers/{name}", "consensus"):
            update, reference = (
                update_of(config, run / adapter) for run in (both.run(name), undisturbed.simulated)
            )
            parts = {
                part: relative_difference(update, reference, part)
                for part in ("lora_A", "lora_B", "classifier")
            }
            print(
                f"{name} {adapter}: "
                + ", ".join(f"{part} {off:.1e}" for part, off in parts.items())
            )
            assert_same(update, reference, UPDATE_BOUND["adamw"], "classification")
    phone, tablet = (update_of(config, undisturbed.simulated / "peers" / name) for name in DEVICES)
    with pytest.raises(AssertionError):  # they differ by more than that, so it can fail
        assert_same(phone, tablet, UPDATE_BOUND["adamw"], "classification")
    assert both.adapter("phone") == both.adapter("tablet")
    for name in DEVICES:
        assert both.result(name)["consensus_peers"] == 2
        assert list(both.result(name)["edges"].values()) == [
            {"mixed": 4, "left_out": 0, "in_doubt": 0}
        ]


def test_the_bytes_of_both_axes_are_those_of_the_plan(undisturbed: Undisturbed) -> None:
    """Law 8, counted apart: with the neighbour on one wire, with the cloud on the other."""
    for name, said in undisturbed.plans.items():
        assert (said.exit_code, said.err) == (0, ""), said
        plan, counted = json.loads(said.out), undisturbed.both.result(name)
        shares = (
            counted["bytes_on_wire"] / plan["bytes_on_wire"],
            counted["cloud_bytes"] / plan["cloud"]["cloud_bytes"],
        )
        print(
            name,
            counted["bytes_on_wire"],
            counted["cloud_bytes"],
            *(f"{100 * (share - 1):+.2f} %" for share in shares),
        )
        assert shares == pytest.approx((1, 1), rel=0.02)
        table = call("plan", undisturbed.both.folder / f"{name}.yaml", "--name", name).out
        assert "phone - tablet" in table and "with the cloud, float32" in table


def test_both_counts_are_in_the_log_the_table_and_the_report(undisturbed: Undisturbed) -> None:
    for name in DEVICES:
        both = undisturbed.both
        rounds = both.events(name, "round")
        for axis in ("bytes_on_wire", "cloud_bytes"):
            counts = [event[axis] for event in rounds]
            assert counts == sorted(set(counts)) and 0 < counts[-1] < both.result(name)[axis]
            assert both.events(name, "run-done")[0][axis] == both.result(name)[axis]
        assert [event["rounds_done"] for event in both.events(name, "scores")] == [2, 4]
        for axis in ("bytes_on_wire", "cloud_bytes"):
            assert bytes_text(both.result(name)[axis]) in undisturbed.outcomes[name].out
        page = (both.run(name) / "report.html").read_text(encoding="utf-8")
        assert "sent and received by this peer" in page and "to the cloud and back" in page


def test_a_device_and_the_cloud_are_killed_and_the_run_ends_with_the_same_bits(
    tmp_path: Path,
    model_folder: ModelFolder,
    undisturbed: Undisturbed,
) -> None:
    """The other device and the run wait for both: silence_s is longer than they are away."""
    whole = sum(undisturbed.both.result(name)["cloud_bytes"] for name in DEVICES)
    with (
        Relay() as relay,
        running(Both(tmp_path, model_folder("bert"), dialled=relay.address)) as both,
    ):
        relay.to(both.address)
        both.start_hub()
        relay.at(int(0.3 * whole), lambda: both.kill("phone"))
        both.start_all()
        until(lambda: relay.has_acted, "the device to be killed")
        relay.at(relay.passed + int(0.2 * whole), lambda: both.kill(HUB))
        both.start("phone", "--resume")
        until(lambda: relay.has_acted, "the cloud to be killed")
        both.start_hub()
        outcomes = both.finish_all()
    assert {
        name: (outcome.exit_code, outcome.err) for name, outcome in outcomes.items()
    } == dict.fromkeys(DEVICES, (0, ""))
    lost = [event for name in DEVICES for event in both.events(name, "cloud-lost")]
    assert lost and len(lost) == sum(len(both.events(name, "cloud-back")) for name in DEVICES)
    for name in DEVICES:
        assert both.adapter(name) == undisturbed.both.adapter(name)
        assert [event["round"] for event in both.events(name, "round")] == [0, 1, 2, 3]
        assert [event["loss"] for event in both.events(name, "round")] == [
            event["loss"] for event in undisturbed.both.events(name, "round")
        ]


def test_neighbours_go_on_without_a_device_whose_cloud_is_away(
    tmp_path: Path, model_folder: ModelFolder
) -> None:
    """Each device has a cloud of its own, and a wire; the run waits silence_s for the one that is
    stuck, once.
    """
    changes = {
        "train.rounds": 40,
        "peers.silence_s": 1.0,
        "peers.catch_up_after": 3,
        "eval_every": 0,
    }
    both = Both(tmp_path, model_folder("bert"), changes)
    with running(both):
        both.start_hub()
        both.start(ATTIC)
        both.start("phone")
        both.start("tablet", "--set", f"split.cloud={ATTIC}", "--set", "split.wire=bfloat16")
        until(lambda: both.rounds_done("tablet") >= 2, "two rounds")
        both.kill(ATTIC)
        until(lambda: both.events("tablet", "cloud-lost"), "the device to miss its cloud")
        stuck_at = both.rounds_done("tablet")
        until(lambda: both.rounds_done("phone") >= stuck_at + 6, "the other to go on")
        assert both.rounds_done("tablet") == stuck_at
        both.start(ATTIC)
        outcomes = both.finish_all()
    assert {name: outcome.exit_code for name, outcome in outcomes.items()} == dict.fromkeys(
        DEVICES, 0
    )
    assert outcomes["phone"].err == ""
    assert outcomes["tablet"].err.startswith(
        "warning: tablet: it was far behind, and took the state of phone to go from round"
    )
    left_out = [event["reason"] for event in both.events("phone", "edge") if not event["committed"]]
    assert left_out[0] == "nothing came for 1 s" and set(left_out[1:5]) == {"it is away"}
    assert [event["was"] < event["round"] for event in both.events("tablet", "caught-up")] == [True]
    assert (
        both.adapter("phone") == both.adapter("tablet")
        and both.result("phone")["consensus_peers"] == 2
    )


def test_ctrl_c_while_the_cloud_is_away_ends_a_device_that_can_go_on(
    tmp_path: Path, model_folder: ModelFolder
) -> None:
    both = Both(tmp_path, model_folder("bert"), {"train.rounds": 8, "peers.silence_s": 1.0})
    with running(both):
        both.start_all()  # no cloud yet
        until(lambda: all(both.events(name, "start") for name in DEVICES), "both to wait")
        for name in DEVICES:
            both.signal(name, signal.SIGINT)
        for name, outcome in both.finish_all().items():
            assert (outcome.exit_code, outcome.out) == (4, ""), outcome
            assert (
                f"{name} stopped while its cloud was away; what was saved stands; go on with: dlora"
                " device" in outcome.err
            )
        both.start_hub()
        both.start_all("--resume")
        until(lambda: min(map(both.rounds_done, DEVICES)) >= 1, "a round")
        both.kill(HUB)
        until(
            lambda: any(both.events(name, "cloud-lost") for name in DEVICES),
            "a device to miss its cloud",
        )
        for name in DEVICES:
            both.signal(name, signal.SIGINT)
        assert {outcome.exit_code for outcome in both.finish_all().values()} == {4}
        both.start_hub()
        both.start_all("--resume")
        assert {
            name: (said.exit_code, said.err) for name, said in both.finish_all().items()
        } == dict.fromkeys(DEVICES, (0, ""))
    assert both.adapter("phone") == both.adapter("tablet")
    for name in DEVICES:
        assert [event["round"] for event in both.events(name, "round")] == list(range(8))
