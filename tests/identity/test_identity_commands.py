"""Keys and certificates from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlora.identity.certificates import fingerprint
from dlora.identity.federation import Federation
from dlora.identity.keys import Identity
from kit.call_cli import call, contents
from kit.identities import at


def test_the_way_of_three_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = call("identity", "new", "north", "--address", "north.example.org:7000")
    assert (made.exit_code, made.err) == (0, "")
    assert made.out.startswith("north.key: the key; it stays here")
    assert "north.member.yaml: send it" in made.out
    assert call("identity", "new", "east", "--role", "cloud").exit_code == 0
    Path("far").mkdir()
    assert call("identity", "new", "south", "--folder", "far").exit_code == 0
    outcome = call(
        "identity", "federation", "north.member.yaml", "far/south.member.yaml", "east.member.yaml"
    )
    assert (outcome.exit_code, outcome.err) == (0, "")
    Path("federation.yaml").write_text(outcome.out)
    federation = Federation.load("federation.yaml")
    roles = {name: (member.role, member.address) for name, member in federation.members.items()}
    assert roles == {
        "east": ("cloud", None),
        "north": ("peer", "north.example.org:7000"),
        "south": ("peer", None),
    }
    shown = call("identity", "show", "federation.yaml")
    assert (shown.exit_code, shown.err) == (0, "")
    heads = [
        "east (cloud, only dials)",
        "north (peer, north.example.org:7000)",
        "south (peer, only dials)",
    ]
    assert shown.out.splitlines()[::3] == heads
    for name, folder in (("north", ""), ("south", "far")):
        [pem] = federation.member(name).certificates
        for file in (Path(folder, f"{name}.key"), Path(folder, f"{name}.member.yaml")):
            one = call("identity", "show", file)
            assert one.out.splitlines()[2] == f"  {fingerprint(pem)}"
            assert "valid: from 20" in one.out and "BEGIN" not in one.out
            assert fingerprint(pem) in shown.out
        Identity.load(name, Path(folder, f"{name}.key"), federation)


def test_show_says_what_is_over(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, days=800)
    assert call("identity", "show", "federation.yaml").out.count("  expired: from 20") == 3
    at(monkeypatch, days=-1)
    assert "  not yet valid: from 20" in call("identity", "show", "anna.key").out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["new", "anna"], "anna.member.yaml exists and is never overwritten"),
        (["new", "x", "--role", "boss"], "role is 'boss'"),
        (["new", "x", "--address", "x"], "address is 'x'"),
        (["federation", "anna.key"], "anna.key holds a private key"),
        (["federation", "federation.yaml", "no.yaml"], "no.yaml cannot be read"),
        (["show", "no.yaml"], "no.yaml cannot be read"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str, work: Path) -> None:
    before = contents(work)
    outcome = call("identity", *arguments)
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert (
        outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and says in outcome.err
    )
    assert contents(work) == before


@pytest.mark.parametrize("command", ["new", "federation", "show"])
def test_the_help_has_an_example(command: str) -> None:
    outcome = call("identity", command, "--help")
    assert outcome.exit_code == 0
    assert f"Example: dlora identity {command} " in outcome.out
