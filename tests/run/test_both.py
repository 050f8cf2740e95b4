"""Both systems at once: devices that lean on a cloud for the frozen model and agree with their
neighbours without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import dlora
from dlora.config.run import Config
from dlora.identity.federation import Federation, FederationFile, Role, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.net.grpc import GrpcNetwork
from dlora.show.words import bytes_text
from dlora.wire.frame import FrameKind
from dlora.wire.peer.codec import PEERS
from dlora.wire.split.codec import split_kind
from kit.call_cli import Outcome, call, change, contents
from kit.processes import HUB, Split, free_ports, running, until
from kit.relay import Relay
from kit.updates import UPDATE_BOUND, assert_same, relative_difference, update_of

ModelFolder = Callable[..., Path]
DEVICES = ("phone", "tablet")
LISTENS = "phone"  # the other one only dials
ATTIC = "attic"  # another cloud


class Both(Split):
    """Devices that are each other's neighbours, the first of them with an address; hub is there for
    all.
    """

    def __init__(
        self, folder: Path, model: Path, changes: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        super().__init__(folder, model, changes, devices=DEVICES, **more)
        members = [folder / f"{name}.member.yaml" for name in (HUB, *DEVICES)]
        port, self.attic = free_ports(4)[2:]  # the first two are the hub's
        members.append(new_identity(ATTIC, f"127.0.0.1:{self.attic}", "cloud", folder)[1])
        tree = yaml.safe_load(federation_text(members))
        for member in tree["members"]:
            if member["name"] == LISTENS:
                member["address"] = f"127.0.0.1:{port}"
        (folder / "federation.yaml").write_text(yaml.safe_dump(tree))

    def config(self, name: str, changes: Mapping[str, Any] | None = None) -> Config:
        files = {each: str(self.folder / f"{each}.jsonl") for each in DEVICES}
        shared = {
            "data.train": files,
            "peers.members": list(DEVICES),
            "peers.weights": "laplacian",
            "eval_every": 2,
        }
        return super().config(name, {**shared, **self.changes, **(changes or {})})

    def arguments(self, name: str, *more: str) -> list[str]:
        if name == ATTIC:
            listen = ["--set", f"listen=127.0.0.1:{self.attic}", "--set", "metrics=null"]
            return [
                "cloud",
                str(self.folder / "cloud.yaml"),
                *self.credentials(name),
                *listen,
                *more,
            ]
        return super().arguments(name, *more)

    def start_all(self, *more: str) -> None:
        for name in DEVICES:
            self.start(name, *more)

    def finish_all(self) -> dict[str, Outcome]:
        return {name: self.finish(name) for name in DEVICES}

    def result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = self.summary(name)["runs"]["dec-lora"]
        return result


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


# What goes wrong


@pytest.mark.slow
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


@pytest.mark.slow  # 10 s of waiting for what is away
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


@pytest.mark.slow
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


# Who may be whose neighbour


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys of a cloud, two devices that listen and a peer, and their federation
    file.
    """
    folder, ports = tmp_path_factory.mktemp("members"), free_ports(4)
    roles: dict[str, Role] = {
        "hub": "cloud",
        "phone": "device",
        "tablet": "device",
        "north": "peer",
    }
    files = [
        new_identity(name, f"127.0.0.1:{port}", role, folder)[1]
        for (name, role), port in zip(roles.items(), ports, strict=True)
    ]
    (folder / "federation.yaml").write_text(federation_text(files))
    return folder


# what has none is told of that first
OWN_FILE = {"data.train": {"north": __file__, "phone": __file__}}
# Program; who; changes to the config; what is said.
MISTAKES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "cloud-as-neighbour": ("device", "phone", {"peers.members": ["phone", "hub"]},
        "peers.members: hub is a cloud in"),
    "peer-beside-device": ("device", "phone", {"peers.members": ["phone", "north"]},
        "with split all members are devices"),
    "device-beside-peer": (
        "peer", "north", {"peers.members": ["north", "phone"], "split": None} | OWN_FILE,
        "without split all members are peers",
    ),
    "device-is-the-cloud": ("device", "phone", {"split.cloud": "tablet"},
        "split.cloud tablet is a device in"),
    "peer-with-a-cloud": ("peer", "north", {"peers.members": ["north", "phone"]} | OWN_FILE,
        "north is a peer in"),
    "device-without-split": ("device", "phone", {"split": None},
        "split is missing; a device needs the name of its cloud"),
    "not-a-member": ("device", "phone", {"peers.members": ["tablet"]},
        "--name phone is not in peers.members (tablet)"),
    "nobody-to-listen-for": ("device --listen 127.0.0.1:7000", "phone", {"peers": {}},
        "--listen is for neighbours to dial"),
    "no-labels": ("device", "phone", {"data.labels": None}, "data.labels is missing"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    mistake: str, members: Path, model_folder: ModelFolder, tmp_path: Path
) -> None:
    words, name, changes, says = MISTAKES[mistake]
    program, *more = words.split()
    both = Both(tmp_path, model_folder("bert"))
    tree = yaml.safe_load(both.config(name).dump())
    tree["data"]["train"].setdefault(name, tree["data"]["train"]["phone"])
    change(tree, changes)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    credentials = [
        "--name",
        name,
        "--key",
        str(members / f"{name}.key"),
        "--federation",
        str(members / "federation.yaml"),
    ]
    before = contents(tmp_path)
    outcome = call(program, tmp_path / "run.yaml", *credentials, *more)
    assert (outcome.exit_code, outcome.out) == (2, ""), outcome
    assert says in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert contents(tmp_path) == before


# Who dials whom, as whose neighbour, carrying what; whether there is a link.
DIALS: dict[str, tuple[str, str, FrameKind, bool]] = {
    "a neighbour, as neighbours do": ("tablet", "phone", PEERS, True),
    "a neighbour, as devices dial clouds": ("tablet", "phone", split_kind().as_bytes, False),
    "the cloud, as neighbours do": ("hub", "phone", PEERS, False),
    "a peer, as neighbours do": ("north", "phone", PEERS, False),
    "a device at the cloud, as devices dial clouds": ("tablet", "hub", split_kind().as_bytes, True),
    "a device at the cloud, as neighbours do": ("tablet", "hub", PEERS, False),
    "a peer at the cloud, as devices dial clouds": ("north", "hub", split_kind().as_bytes, False),
}


@pytest.mark.parametrize("dial", DIALS)
def test_no_certificate_serves_in_anothers_place(
    dial: str, members: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device phone listens for its neighbour tablet, hub for devices, each on its own
    protocol.
    """
    who, whom, kind, links = DIALS[dial]

    def network(
        name: str, neighbours: list[str] | None, listen: str | None, kind: FrameKind
    ) -> GrpcNetwork:
        federation = FederationFile(members / "federation.yaml")
        identity = Identity.load(name, members / f"{name}.key", federation.current)
        return GrpcNetwork(identity, federation, neighbours, listen, kind, refused.append)

    async def main() -> None:
        attempts, linked = asyncio.Queue[None](), asyncio.Event()

        async def talk(name: str, link: Any) -> None:
            linked.set()
            await asyncio.Event().wait()

        address = Federation.load(members / "federation.yaml").member(whom).address
        listener = network(
            whom,
            None if whom == "hub" else ["tablet"],
            address,
            split_kind().as_bytes if whom == "hub" else PEERS,
        )
        dialler = network(who, [whom], None, kind)
        attempt = dialler._dialling._dial

        async def counted(*place: str) -> float:
            lived_s = await attempt(*place)
            attempts.put_nowait(None)
            return lived_s

        monkeypatch.setattr(dialler._dialling, "_dial", counted)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            serving = [tasks.create_task(listener.serve(talk))]
            await listener.bound.wait()
            serving.append(tasks.create_task(dialler.serve(talk)))
            if links:
                await linked.wait()
            else:
                await attempts.get()
                await attempts.get()
            for task in serving:
                task.cancel()
        assert linked.is_set() == links

    refused: list[str] = []
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(main())
