"""The federation file: what it takes, what it refuses, and what happens when it changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from dlora.identity import certificates
from dlora.identity import federation as federation_file
from dlora.identity.federation import Federation, FederationFile, Member, federation_text
from kit.forged_certificates import Shape, forge
from kit.identities import ADDRESSES, certificate_of, entry, refusal, write

# The federation file


def test_what_is_dumped_is_what_is_loaded(work: Path, made: dict[str, tuple[str, str]]) -> None:
    federation = Federation.load("federation.yaml")
    assert federation.members == {
        name: Member(name, "peer", ADDRESSES[name], (certificate_of(made[name][1]),))
        for name in ("anna", "bob", "carol")
    }
    assert federation.dump() == Path("federation.yaml").read_text()
    # for other readers of YAML
    assert yaml.safe_load(federation.dump())["members"][1]["address"] is None


def test_the_order_of_the_files_does_not_matter(work: Path) -> None:
    names = ["bob.member.yaml", "carol.member.yaml", "anna.member.yaml"]
    assert federation_text(names) == Path("federation.yaml").read_text()


def test_a_federation_grows_from_the_file_before(work: Path) -> None:
    text = federation_text(["federation.yaml", "dave.member.yaml"])
    assert text == federation_text([f"{name}.member.yaml" for name in ADDRESSES])


def test_a_certificate_counts_for_its_own_name_only(
    work: Path, made: dict[str, tuple[str, str]]
) -> None:
    federation = Federation.load("federation.yaml")
    for owner in ADDRESSES:
        certificate = x509.load_pem_x509_certificate(certificate_of(made[owner][1]).encode())
        der = certificate.public_bytes(serialization.Encoding.DER)
        listed = [name for name in ADDRESSES if federation.is_listed(name, der)]
        assert listed == ([] if owner == "dave" else [owner])
        assert not federation.is_listed(owner, der + b"\0")
    assert not federation.is_listed("anna", b"")


def test_only_those_asked_for_are_trusted(work: Path, made: dict[str, tuple[str, str]]) -> None:
    federation = Federation.load("federation.yaml")
    anna, bob = (certificate_of(made[name][1]) for name in ("anna", "bob"))
    assert federation.trusted(["bob"]).decode() == bob
    assert federation.trusted(["anna", "bob"]).decode() == anna + bob
    refusal(lambda: federation.trusted(["dave"]), "dave is not a member")


def test_an_unknown_member_is_told_the_nearest(work: Path) -> None:
    federation = Federation.load("federation.yaml")
    refusal(
        lambda: federation.member("ana"),
        "ana is not a member in federation.yaml",
        "anna, bob, carol",
        "mean anna?",
    )
    refusal(lambda: federation.member("zzz"), "zzz", "anna, bob, carol", "add its member file")


def test_one_of_two_neighbours_must_be_dialable(work: Path) -> None:
    federation = Federation.load(
        write("four.yaml", federation_text([f"{name}.member.yaml" for name in ADDRESSES]))
    )
    federation.check_dialable([("anna", "bob"), ("dave", "anna"), ("anna", "carol")])
    refusal(
        lambda: federation.check_dialable([("anna", "bob"), ("bob", "dave")]),
        "bob and dave",
        "four.yaml",
        "HOST:PORT",
    )
    refusal(lambda: federation.check_dialable([("anna", "eve")]), "eve is not a member")


GOOD: dict[str, Any] = {"role": "peer", "address": None}
# the content of the file; "PEM" stands for anna's certificate -> what is said
BROKEN: dict[str, tuple[Any, list[str]]] = {
    "empty": ("", ["is empty"]),
    "no-yaml": ("members: [", ["is not YAML", "line 1"]),
    "deep": ("[" * 5000, ["is not YAML"]),
    "no-such-character": ('"\\UFFFFFFFF"', ["is not YAML"]),
    "a-list": (["anna"], ["expected the keys name, role, address, certificates", "got a list"]),
    "no-members": ({"members": []}, ["one key, members"]),
    "more-keys": ({"members": [entry(certificates=["PEM"])], "extra": 1}, ["one key, members"]),
    "a-word": ({"members": ["anna"]}, ["member 1", "expected the keys", "got 'anna'"]),
    "unknown-key": (
        {"members": [entry(certificates=["PEM"]) | {"adress": "a:1"}]},
        ["member 1", "'adress'"],
    ),
    "missing-key": (
        {"members": [{"name": "anna", "role": "peer"}]},
        ["member 1", "got the keys 'name', 'role'"],
    ),
    "bad-name": (
        {"members": [entry("../anna", certificates=["PEM"])]},
        ["member 1", "name is '../anna'"],
    ),
    "bad-role": (
        {"members": [entry(role="boss", certificates=["PEM"])]},
        ["member 1 (anna)", "role is 'boss'", "cloud"],
    ),
    "list-role": ({"members": [entry(role=["peer"], certificates=["PEM"])]}, ["role is a list"]),
    "bad-address": (
        {"members": [entry(address="anna", certificates=["PEM"])]},
        ["(anna)", "address is 'anna'"],
    ),
    "no-certificate": ({"members": [entry()]}, ["(anna)", "certificates is a list", "one or more"]),
    "one-certificate": (
        {"members": [entry() | {"certificates": "PEM"}]},
        ["(anna)", "expected a list"],
    ),
    "not-pem": (
        {"members": [entry(certificates=["anna"])]},
        ["(anna)", "not exactly one certificate"],
    ),
    "cut-pem": (
        {"members": [entry(certificates=["PEM CUT"])]},
        ["(anna)", "not exactly one certificate"],
    ),
    "one-behind-another": (
        {"members": [entry(certificates=["PEM PEM"])]},
        ["(anna)", "not exactly one certificate"],
    ),
    "under-two-names": (
        {"members": [entry(certificates=["PEM"]), entry("bob", certificates=["PEM"])]},
        ["member 2 (bob)", "made for anna, not for bob"],
    ),
    "twice": ({"members": [entry(certificates=["PEM"])] * 2}, ["has anna twice"]),
    "a-key-twice": ("members: []\nmembers: []\n", ["is not YAML", "a key stands twice", "line 1"]),
    "too-large": ("#" * (1 << 20) + "\n", ["more than 1,048,576 bytes"]),
    "not-text": (b"members: \xff", ["not text at byte 9"]),
    "private-key": ("-----BEGIN PRIVATE KEY-----\n", ["private key", "NAME.member.yaml"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_federation_file_that_cannot_be_used(
    name: str, work: Path, made: dict[str, tuple[str, str]]
) -> None:
    content, says = BROKEN[name]
    pem = certificate_of(made["anna"][1])
    if isinstance(content, list | dict):
        content = yaml.safe_dump(content)
        for word, text in {"PEM PEM": pem + pem, "PEM CUT": pem[:300], "PEM": pem}.items():
            lines = yaml.safe_dump(text, default_style='"', width=10_000).strip()
            content = content.replace(f"- {word}\n", f"- {lines}\n").replace(
                f" {word}\n", f" {lines}\n"
            )
    Path("broken.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal(lambda: Federation.load("broken.yaml"), "broken.yaml", *says)
    refusal(lambda: federation_text(["broken.yaml"]), "broken.yaml", *says)


def test_files_that_are_no_federation_files(work: Path) -> None:
    refusal(
        lambda: Federation.load("no.yaml"), "no.yaml cannot be read (No such file", "give the path"
    )
    refusal(lambda: Federation.load("."), "cannot be read (Is a directory)")
    refusal(
        lambda: Federation.load("anna.member.yaml"),
        "anna.member.yaml is the file of one member",
        "identity federation",
    )
    refusal(lambda: Federation.load("anna.key"), "anna.key holds a private key")


@given(st.text() | st.binary().map(lambda content: content.decode("latin-1")))
def test_any_text_is_refused_in_one_line(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federation_file, "read_text", lambda path: text)
        refusal(lambda: Federation.load("any.yaml"), "any.yaml")


FORGED: dict[str, tuple[Shape, str]] = {
    "an-authority": (Shape(ca=True, may_sign_certificates=True), "which cannot sign others"),
    "not-critically-none": (Shape(ca_critical=False), "which cannot sign others"),
    "may-sign": (Shape(may_sign_certificates=True), "which cannot sign others"),
    "usage-not-critical": (Shape(usage_critical=False), "which cannot sign others"),
    "two-names": (Shape(alternatives=("anna", "bob")), "which cannot sign others"),
    "another-name": (Shape(alternatives=("bob",)), "which cannot sign others"),
    "anothers": (
        Shape(name="bob", issuer="bob", alternatives=("bob",)),
        "made for bob, not for anna",
    ),
    "not-self-signed": (Shape(issuer="bob"), "not exactly one certificate"),
    "ed25519": (Shape(ed25519=True), "which cannot sign others"),
}


def test_what_is_forged_well_is_taken() -> None:
    """Or the table above would prove nothing."""
    assert certificates.checked(forge(Shape()), "anna", "here")


@pytest.mark.parametrize("name", FORGED)
def test_a_certificate_of_another_form_is_not_listed(name: str) -> None:
    shape, says = FORGED[name]
    refusal(lambda: certificates.checked(forge(shape), "anna", "here"), "here: ", says)


def test_text_around_a_certificate_is_not_passed_on(made: dict[str, tuple[str, str]]) -> None:
    pem = certificate_of(made["anna"][1])
    assert certificates.checked(f"bag attributes\n{pem}\nand more", "anna", "here") == pem


# A federation file that changes


def test_a_changed_file_is_taken_up(work: Path) -> None:
    file = FederationFile("federation.yaml")
    before = file.current
    assert file.current is before  # nothing changed, nothing read
    Path("federation.yaml").write_text(federation_text(["federation.yaml", "dave.member.yaml"]))
    assert list(file.current.members) == ["anna", "bob", "carol", "dave"]
    Path("next.yaml").write_text(federation_text(["anna.member.yaml"]))
    os.replace("next.yaml", "federation.yaml")
    assert list(file.current.members) == ["anna"]


def test_a_change_that_keeps_the_size_is_seen(work: Path) -> None:
    file = FederationFile("federation.yaml")
    text = (
        Path("federation.yaml")
        .read_text()
        .replace("anna.example.org:7000", "anna.example.org:7001")
    )
    Path("federation.yaml").write_text(text)
    os.utime("federation.yaml", ns=(1, 1))  # whatever the clock of the file system
    assert file.current.member("anna").address == "anna.example.org:7001"


def test_a_broken_change_keeps_what_was(work: Path) -> None:
    file, text = FederationFile("federation.yaml"), Path("federation.yaml").read_text()
    before = file.current
    Path("federation.yaml").write_text("members: oops\n")
    with pytest.warns(
        UserWarning, match="the one before still is: federation.yaml is not a federation file"
    ) as caught:
        assert file.current is before
    assert len(caught) == 1
    assert file.current is before  # and no second warning, which would be an error here
    Path("federation.yaml").unlink()
    with pytest.warns(UserWarning, match="No such file"):
        assert file.current is before
    assert file.current is before
    Path("federation.yaml").write_text(text)
    assert file.current is not before and file.current == before


def test_a_file_that_is_broken_from_the_start(work: Path) -> None:
    Path("federation.yaml").write_text("members: oops\n")
    refusal(lambda: FederationFile("federation.yaml"), "federation.yaml is not a federation file")
