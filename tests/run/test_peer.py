"""Law 5 over TLS: four real peers end where their simulation ends; law 8 on their wire; and what is
refused before a run.
"""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file

import dlora
from dlora.data.batches import collate
from dlora.identity import certificates, keys
from dlora.identity import federation as federation_file
from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from dlora.run.prepare import prepare
from kit.as_simulated import assert_as_simulated
from kit.call_cli import Outcome, call, contents
from kit.processes import NAMES, Federation, running
from kit.updates import KINDS, UPDATE_BOUND, assert_same, relative_difference, update_of

TOPOLOGIES = {"ring": {"kind": "ring"}, "base-k": {"kind": "base-k"}}
DIAL_ONLY = "west"


class Finished(NamedTuple):
    """A run of four peers that is over, its simulation, and what was planned."""

    peers: Federation
    outcomes: dict[str, Outcome]
    simulated: Path
    plan: Outcome


@pytest.fixture(scope="module", params=["ring", pytest.param("base-k", marks=pytest.mark.slow)])
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Callable[..., Path],
) -> Finished:
    """Four peers over TLS on loopback, one of which can only dial; and `simulate` with the same
    config.
    """
    folder = tmp_path_factory.mktemp(request.param)
    peers = Federation(
        folder,
        model_folder("bert"),
        {"peers.topology": TOPOLOGIES[request.param], "eval_peers_every": 2},
        dial_only=[DIAL_ONLY],
    )
    with running(peers):
        peers.start_all()
        dlora.simulate(peers.config)
        plan = call("plan", peers.config_path, "--json")
        return Finished(peers, peers.finish_all(), Path(peers.config.output_dir), plan)


def test_every_peer_finishes_and_says_little_without_a_terminal(finished: Finished) -> None:
    for name, outcome in finished.outcomes.items():
        assert (outcome.exit_code, outcome.err) == (0, "")
        assert outcome.out.endswith(f"report: {finished.peers.run(name)}/report.html\n")


def test_peers_end_where_their_simulation_ends(finished: Finished) -> None:
    """Law 5: each peer's own factors and the average, A, B and the head apart."""
    config = finished.peers.config
    for name in NAMES:
        for adapter in (f"peers/{name}", "consensus"):
            update, reference = (
                update_of(config, run / adapter)
                for run in (finished.peers.run(name), finished.simulated)
            )
            assert_same(update, reference, UPDATE_BOUND["adamw"], "classification")
            parts = {
                part: relative_difference(update, reference, part)
                for part in ("lora_A", "lora_B", "classifier")
            }
            print(
                f"{name} {adapter}: "
                + ", ".join(f"{part} {off:.1e}" for part, off in parts.items())
            )
    north, east = (
        update_of(config, finished.simulated / "peers" / name) for name in ("north", "east")
    )
    with pytest.raises(AssertionError):  # peers differ by more than that, so it can fail
        assert_same(north, east, UPDATE_BOUND["adamw"], "classification")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:peers train one at a time")
@pytest.mark.parametrize(
    "kind", ["rslora", "patterns", "dora", "pissa", "biases", "whole-modules", "ia3"]
)
def test_peers_of_pefts_other_kinds_end_where_their_simulation_ends(
    tmp_path: Path, model_folder: Callable[..., Path], kind: str
) -> None:
    """Law 5."""
    peers = Federation(tmp_path, model_folder("bert"), KINDS[kind], names=("north", "south"))
    with running(peers):
        peers.start_all()
        outcomes = peers.finish_all()
    assert {outcome.exit_code for outcome in outcomes.values()} == {0}, outcomes
    assert_as_simulated(peers)


def test_all_peers_hold_one_consensus_adapter_and_one_story(finished: Finished) -> None:
    finished.peers.assert_agreed()
    topology = prepare(finished.peers.config).topology
    for index, name in enumerate(NAMES):
        due = {
            (round, NAMES[other])
            for round in range(4)
            for other in topology.neighbours(index, round)
        }
        assert finished.peers.ledger(name) == dict.fromkeys(due, "committed")


def test_a_neighbour_that_has_ended_well_has_finished(finished: Finished) -> None:
    for name in NAMES:
        reasons = [event["reason"] for event in finished.peers.events(name, "unlinked")]
        assert reasons == ["it has finished"] * 2, name


def test_the_adapters_load_with_peft_and_give_the_printed_score(finished: Finished) -> None:
    prepared = prepare(finished.peers.config)
    batch = collate(prepared.data.evaluation, prepared.pad_token_id)
    result = finished.peers.summary("south")["runs"]["dec-lora"]
    for adapter, expected in {
        "consensus": result["consensus"],
        "peers/south": result["peers"]["south"],
    }.items():
        base, _ = dlora.load_base(str(finished.peers.run("south")))
        model = peft.PeftModel.from_pretrained(base, finished.peers.run("south") / adapter).eval()
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        assert (logits.argmax(-1) == batch.labels).double().mean().item() == expected["accuracy"]
        assert torch.nn.functional.cross_entropy(logits, batch.labels).item() == pytest.approx(
            expected["loss"], abs=1e-5
        )


def test_the_bytes_on_the_wire_are_those_of_the_plan(finished: Finished) -> None:
    """Law 8, each peer's links in both directions."""
    assert (finished.plan.exit_code, finished.plan.err) == (0, "")
    edges = json.loads(finished.plan.out)["edges"]
    for name in NAMES:
        planned = sum(count for edge, count in edges.items() if name in edge.split(" - "))
        counted = finished.peers.summary(name)["runs"]["dec-lora"]["bytes_on_wire"]
        print(
            f"{name}: {counted} bytes on the wire, {100 * (counted / planned - 1):+.2f} % of the"
            " plan"
        )
        assert counted == pytest.approx(planned, rel=0.02)


def test_a_peer_leaves_a_run_folder_without_its_key(finished: Finished) -> None:
    for name in NAMES:
        run = finished.peers.run(name)
        assert {path.name for path in run.iterdir()} == {
            "config.yaml", "manifest.json", "log.jsonl", "summary.json", "report.html", "consensus",
            "peers", "checkpoints",
            "exchange",
        }  # fmt: skip
        key = (finished.peers.folder / f"{name}.key").read_text()
        secret = key.split("-----")[2].split("\n")[1].encode()
        assert len(secret) == 64
        held = [
            path
            for path, content in contents(run).items()
            if content and (secret in content or b"PRIVATE KEY" in content)
        ]
        assert held == []
        assert [event["round"] for event in finished.peers.events(name, "round")] == [0, 1, 2, 3]
        assert [event["rounds_done"] for event in finished.peers.events(name, "scores")] == [2, 4]
        _ = load_file(run / "checkpoints" / "dec-lora" / "round-000004" / "factors.safetensors")


# What is refused before a run


@pytest.fixture(scope="module")
def lonely(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]
) -> Federation:
    """Members of which none is started."""
    return Federation(tmp_path_factory.mktemp("lonely"), model_folder("bert"))


def refused(federation: Federation, *arguments: str) -> str:
    """Start a peer here; it must refuse with one line and leave everything as it was. Returns the
    line.
    """
    before = contents(federation.folder)
    outcome = call(*arguments)
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1, outcome.err
    assert contents(federation.folder) == before
    return outcome.err


def test_a_name_that_is_no_member_is_refused(lonely: Federation) -> None:
    line = refused(lonely, *lonely.arguments("nort"))
    assert (
        "--name nort is not in peers.members (north, east, south, west); did you mean north?"
        in line
    )


def test_a_config_must_name_members_and_labels(lonely: Federation) -> None:
    line = refused(
        lonely, *lonely.arguments("north", "--set", "peers.members=null", "--set", "peers.count=4")
    )
    assert "peers.members is missing" in line
    assert "data.labels is missing" in refused(
        lonely, *lonely.arguments("north", "--set", "data.labels=null")
    )


def test_anothers_key_is_refused_by_its_owners_name(lonely: Federation) -> None:
    arguments = lonely.arguments("north")
    line = refused(lonely, *[argument.replace("north.key", "east.key") for argument in arguments])
    assert "wrong key for the name: " in line and "is the key of east, not of north" in line


def test_a_federation_file_that_lacks_a_member_is_refused(
    lonely: Federation, tmp_path: Path
) -> None:
    listed = [lonely.folder / f"{name}.member.yaml" for name in ("north", "south", "west")]
    (tmp_path / "federation.yaml").write_text(federation_text(listed))
    shorter = {str(lonely.folder / "federation.yaml"): str(tmp_path / "federation.yaml")}
    arguments = [shorter.get(argument, argument) for argument in lonely.arguments("north")]
    assert "east is not a member in" in refused(lonely, *arguments)


def test_two_neighbours_without_an_address_are_refused(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    peers = Federation(tmp_path, model_folder("bert"), dial_only=["east", "south"])
    assert "east and south are neighbours but neither has an address" in refused(
        peers, *peers.arguments("north")
    )


def test_an_address_in_use_is_refused(lonely: Federation) -> None:
    """Found out when everything else is well, yet nothing is left behind."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = refused(
            lonely, *lonely.arguments("north", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        )
        assert str(taken.getsockname()[1]) in line and "listen" in line


@pytest.mark.parametrize(
    "listen",
    [
        "7000",
        ":7000",
        "127.0.0.1:99999",
        "127.0.0.1:http",
        "no-such-host.invalid:7000",
        "192.0.2.1:7000",
    ],
)
def test_a_place_where_nobody_can_listen_is_refused(lonely: Federation, listen: str) -> None:
    assert f"listen {listen}" in refused(
        lonely, *lonely.arguments("north", "--listen", listen)
    ).replace("listen on", "listen")


def test_a_certificate_that_is_not_yet_valid_is_refused(
    lonely: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of this machine is a day slow."""

    class SlowClock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) - timedelta(days=1)

    monkeypatch.setattr(certificates, "datetime", SlowClock)
    assert "set the clock" in refused(lonely, *lonely.arguments("north"))


def test_a_key_that_others_can_read_is_a_warning(tmp_path: Path) -> None:
    key, member = new_identity("north", None, "peer", tmp_path)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    (tmp_path / "federation.yaml").write_text(federation_text([member]))
    listed = federation_file.Federation.load(tmp_path / "federation.yaml")
    key.chmod(0o644)
    with pytest.warns(UserWarning, match="others on this machine can read or change"):
        assert keys.Identity.load("north", key, listed).name == "north"


def test_the_folder_of_another_run_is_refused(finished: Finished) -> None:
    assert "holds this run" in refused(finished.peers, *finished.peers.arguments("north"))


def test_a_run_resumes_only_with_its_own_config(finished: Finished) -> None:
    changed = finished.peers.arguments("north", "--resume", "--set", "train.learning_rate=1e-2")
    assert "resume: train.learning_rate was 0.005 and is 0.01" in refused(finished.peers, *changed)


def test_a_peers_run_is_gone_on_with_by_that_peer(finished: Finished) -> None:
    folder = finished.peers.run("north")
    said = refused(finished.peers, "simulate", str(folder / "config.yaml"), "--resume")
    assert f"go on with: dlora peer {folder}/config.yaml --name north" in said


def test_without_a_run_there_is_nothing_to_resume(lonely: Federation) -> None:
    assert "holds no run" in refused(lonely, *lonely.arguments("north", "--resume"))


def test_peers_in_different_runs_name_the_key_and_both_values(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    peers = Federation(tmp_path, model_folder("bert"), names=("north", "east"))
    with running(peers):
        peers.start("north")
        peers.start("east", "--set", "lora.r=2")
        outcomes = peers.finish_all()
    for (name, outcome), other in zip(outcomes.items(), ("east", "north"), strict=True):
        assert (outcome.exit_code, outcome.out) == (3, ""), outcome
        assert outcome.err.count("\n") == 1
        values = {"north": 4, "east": 2}
        said = (
            f"{other} is in another run: lora.r is {values[name]} at {name} and {values[other]} at"
            f" {other}; make them alike"
        )
        assert said in outcome.err
        assert peers.rounds_done(name) == 0


@pytest.mark.slow
def test_a_key_that_the_others_do_not_know_is_said_and_nobody_is_done(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """One organisation made a new key and did not send it: a person must not find that in a log
    only.
    """
    patience = {"peers.silence_s": 1, "peers.round_limit_s": 2, "train.rounds": 2}
    pair = Federation(tmp_path, model_folder("bert"), patience, names=("north", "south"))
    listed = federation_file.Federation.load(tmp_path / "federation.yaml")
    (tmp_path / "new").mkdir()
    key, member = new_identity("south", listed.member("south").address, "peer", tmp_path / "new")
    federation = tmp_path / "new" / "federation.yaml"
    federation.write_text(federation_text([tmp_path / "north.member.yaml", member]))
    pair.start("north")
    pair.start("south", "--key", str(key), "--federation", str(federation))
    ends = pair.finish_all()
    assert {name: end.exit_code for name, end in ends.items()} == {"north": 3, "south": 3}
    said = " ".join(end.err for end in ends.values())
    assert "shows a certificate that the federation file here does not list for it" in said
    for name, other in (("north", "south"), ("south", "north")):
        assert f"{name} trained alone: no round was mixed with {other}" in ends[name].err
        assert (pair.run(name) / "consensus" / "adapter_model.safetensors").exists()
