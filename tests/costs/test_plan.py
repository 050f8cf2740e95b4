"""`dlora plan`: what a run costs before it runs. Law 8 on real wires is in test_peer.py and
test_slow_link.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlora.show.words import NBSP
from kit.call_cli import call, contents
from kit.processes import NAMES, Federation

ModelFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Federation:
    """Four members in a ring, four rounds."""
    return Federation(tmp_path_factory.mktemp("planned"), model_folder("bert"))


def planned(members: Federation, *more: str) -> dict[str, Any]:
    """What `plan --json` says; it writes nothing."""
    before = contents(members.folder)
    outcome = call("plan", members.config_path, "--json", *more)
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert contents(members.folder) == before
    costs: dict[str, Any] = json.loads(outcome.out)
    return costs


def test_the_sums_are_sums(members: Federation) -> None:
    costs = planned(members)
    assert costs["edges"].keys() == {"north - east", "east - south", "south - west", "north - west"}
    assert costs["bytes_on_wire"] == sum(costs["edges"].values())
    assert costs["bytes_a_round"] * 4 == costs["bytes_on_wire"]
    by_peer = [
        sum(count for edge, count in costs["edges"].items() if name in edge.split(" - "))
        for name in NAMES
    ]
    assert costs["bytes_of_busiest_peer"] == max(by_peer)
    for line, seconds in costs["seconds_on_the_line"].items():
        assert seconds == pytest.approx(max(by_peer) * 8 / (float(line.split()[0]) * 1e6))
    assert [line for line in costs["seconds_on_the_line"]] == [
        "4 Mbit/s",
        "20 Mbit/s",
        "100 Mbit/s",
    ]


def test_messages_are_nearly_all_of_it(members: Federation) -> None:
    """Two messages an edge and round, two more over each edge of the tree at the end; framing stays
    small.
    """
    costs = planned(members, "--set", "train.rounds=100")
    message = costs["message_bytes"]
    assert message > 4 * costs["trainable_parameters"]
    bare = 100 * 4 * 2 * message + 3 * 2 * message
    assert bare < costs["bytes_on_wire"] < 1.03 * bare


def test_bfloat16_halves_the_rounds_and_a_rank_its_share(members: Federation) -> None:
    many = ("--set", "train.rounds=100")
    full, half = planned(members, *many), planned(members, *many, "--set", "peers.wire=bfloat16")
    saved = full["message_bytes"] - half["message_bytes"]
    # of the numbers; names are not halved
    assert saved == pytest.approx(2 * full["trainable_parameters"], rel=0.01)
    assert half["bytes_on_wire"] < 0.6 * full["bytes_on_wire"]
    assert half["trainable_parameters"] == full["trainable_parameters"]
    assert planned(members, "--set", "lora.r=8")["message_bytes"] > 1.8 * full["message_bytes"]


def test_a_sparser_topology_costs_less(members: Federation) -> None:
    ring, pairs = planned(members), planned(members, "--set", "peers.topology.kind=base-k")
    assert pairs["bytes_a_round"] < 0.7 * ring["bytes_a_round"]


def test_a_member_plans_with_its_own_data_alone(members: Federation) -> None:
    own = planned(
        members, "--name", "south", "--set", f"data.train.north={members.folder / 'not-here.jsonl'}"
    )
    of_all = planned(members)
    told = call("plan", members.config_path, "--name", "south").out
    assert "a local step" in told and "rank" not in told
    # seconds are measured, and only who has all data may simulate other numbers of peers
    assert [*own.pop("sizing")["for_peers"]] == ["1"]
    assert len(of_all.pop("sizing")["for_peers"]) == 5
    assert of_all.pop("bytes_simulated") and own == of_all


def test_a_simulation_is_planned_as_if_its_peers_were_real(members: Federation) -> None:
    rows = members.folder / "north.jsonl"
    simulated = [
        "peers.members=null",
        "peers.count=3",
        f"data.train={rows}",
        "data.partition.kind=iid",
    ]
    costs = planned(members, *(word for change in simulated for word in ("--set", change)))
    assert costs["peers"] == 3 and len(costs["edges"]) == 3


def test_the_table_says_what_the_json_says(members: Federation) -> None:
    costs = planned(members)
    outcome = call("plan", members.config_path)
    assert (outcome.exit_code, outcome.err) == (0, "")
    text = outcome.out.replace(NBSP, " ")
    assert (
        "4 peers, 4 rounds; a message with all that trains is"
        f" {costs['message_bytes'] / 1e3:.1f} kB" in text
    )
    for edge in costs["edges"]:
        assert edge in text
    assert "4 Mbit/s" in text and "100 Mbit/s" in text and "memory: " in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.eval=not-here.jsonl", "not-here.jsonl"),
        ("peers.topology.kind=hypercubes", "peers.topology.kind"),
        ("peers.members=[north, east]", "data.train names 4 files"),
    ],
)
def test_what_cannot_run_cannot_be_planned(members: Federation, change: str, said: str) -> None:
    outcome = call("plan", members.config_path, "--set", change)
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1 and said in outcome.err
