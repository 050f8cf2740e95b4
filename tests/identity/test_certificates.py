"""Certificates that are not dlora's, and members that can never meet: what is said of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dlora.identity.federation import Federation
from dlora.identity.keys import Identity, new_identity
from kit.call_cli import call
from kit.made_certificates import one_line

# What is not dlora's own


def signed(key: Any, issuer: str, name: str, signer: Any) -> x509.Certificate:
    now = datetime.now(UTC)
    names = [
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, each)]) for each in (name, issuer)
    ]
    builder = x509.CertificateBuilder(
        names[1], names[0], key.public_key(), x509.random_serial_number()
    )
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(
        now + timedelta(days=90)
    )
    return builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False).sign(
        signer, hashes.SHA256()
    )


def pem(*things: Any) -> str:
    """Keys and certificates, one after the other."""
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return "".join(
        (
            thing.public_bytes(serialization.Encoding.PEM)
            if isinstance(thing, x509.Certificate)
            else thing.private_bytes(serialization.Encoding.PEM, *plain)
        ).decode()
        for thing in things
    )


RSA, AUTHORITY, OWN, ODD = (
    rsa.generate_private_key(65537, 2048),
    ec.generate_private_key(ec.SECP256R1()),
    ec.generate_private_key(ec.SECP256R1()),
    ec.generate_private_key(ec.SECP384R1()),
)
ROOT = signed(AUTHORITY, "Hospital CA", "Hospital CA", AUTHORITY)
LEAF = signed(OWN, "Hospital CA", "north", AUTHORITY)
FOREIGN = {
    "an RSA key": (RSA, [signed(RSA, "north", "north", RSA)], "an RSA key of 2048 bits"),
    "an RSA leaf of a hospital": (
        RSA,
        [signed(RSA, "Hospital CA", "north", AUTHORITY)],
        "an RSA key of 2048 bits",
    ),
    "a leaf of a hospital": (OWN, [LEAF], "a certificate that CN=Hospital CA has signed"),
    "the leaf with its authority behind it": (OWN, [LEAF, ROOT], "a chain of 2 certificates"),
    "another curve": (ODD, [signed(ODD, "north", "north", ODD)], "a key of the kind secp384r1"),
}
TAKEN = "dlora takes a certificate that an ECDSA P-256 key has signed for itself"


@pytest.mark.parametrize("what", FOREIGN)
def test_what_another_authority_made_is_named_and_what_is_taken(what: str, tmp_path: Path) -> None:
    """Field case 28: as a key file, in a member's entry of the federation file, and given as a file
    of its own.
    """
    key, chain, came = FOREIGN[what]
    (tmp_path / "north.key").write_text(pem(key, *chain))
    (tmp_path / "north.key").chmod(0o600)
    entry = {"name": "north", "role": "peer", "address": "a:7000", "certificates": [pem(*chain)]}
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump({"members": [entry]}))
    for name in ("north.key", "federation.yaml"):
        outcome = call("identity", "show", tmp_path / name)
        assert (outcome.exit_code, outcome.out) == (2, "")
        line = one_line(outcome.err)
        assert came in line and TAKEN in line and "dlora identity new" in line
    (tmp_path / "north.crt").write_text(pem(*chain))
    outcome = call("identity", "federation", tmp_path / "north.crt")
    assert (
        outcome.exit_code == 2
        and "north.crt is a key or a certificate of another program" in one_line(outcome.err)
    )
    assert "NAME.member.yaml" in outcome.err


def test_a_key_in_bytes_says_that_text_is_wanted(tmp_path: Path) -> None:
    """Field case 28: DER, as some authorities hand it out."""
    (tmp_path / "north.der").write_bytes(LEAF.public_bytes(serialization.Encoding.DER))
    outcome = call("identity", "show", tmp_path / "north.der")
    assert outcome.exit_code == 2 and "where PEM or YAML is" in one_line(outcome.err)


# Who may read it, who can be dialled, what it is called


@pytest.mark.filterwarnings("always")  # as for a user
def test_show_warns_of_a_key_that_everybody_can_read(tmp_path: Path) -> None:
    """Field case 13."""
    key = new_identity("north", None, "peer", tmp_path)[0]
    assert call("identity", "show", key).err == ""
    key.chmod(0o644)
    outcome = call("identity", "show", key)
    assert outcome.exit_code == 0 and "valid: from" in outcome.out
    assert f"others on this machine can read or change {key}; run: chmod 600 {key}" in one_line(
        outcome.err
    )


MEETING: list[tuple[str, list[tuple[str, str, str | None]], str | None]] = [
    (
        "two peers that only dial",
        [("north", "peer", None), ("south", "peer", None)],
        "no path joins the peers north, south",
    ),
    ("three of them", [(name, "peer", None) for name in "abc"], "no path joins the peers a, b, c"),
    (
        "one can be dialled",
        [("north", "peer", "a:7000"), ("south", "peer", None), ("west", "peer", None)],
        None,
    ),
    ("one alone", [("north", "peer", None)], None),
    (
        "a cloud that nobody can dial",
        [("hub", "cloud", None), ("phone", "device", None)],
        "the cloud hub has no address",
    ),
    (
        "devices and their cloud",
        [("hub", "cloud", "a:7000"), ("phone", "device", None), ("tablet", "device", None)],
        None,
    ),
    (
        "devices alone",
        [("phone", "device", None), ("tablet", "device", None)],
        "no path joins the devices phone, tablet",
    ),
]


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(("what", "members", "says"), MEETING, ids=[case[0] for case in MEETING])
def test_members_that_can_never_meet_are_told_at_once(
    what: str, members: list[tuple[str, str, str | None]], says: str | None, tmp_path: Path
) -> None:
    """Field case 29: the file is made, for more members may come; a warning says it."""
    files = [new_identity(name, address, role, tmp_path)[1] for name, role, address in members]  # type: ignore[arg-type]
    outcome = call("identity", "federation", *files)
    assert outcome.exit_code == 0 and outcome.out.count("- name: ") == len(members)
    if says is None:
        assert outcome.err == ""
    else:
        assert says in one_line(outcome.err) and "--address HOST:PORT" in outcome.err


def test_a_country_whose_code_is_false_in_yaml_is_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field case 22: in the files of the federation, with quotes and without, `no` is the text that
    it looks like.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("no", "se", "off", "y"):
        assert call("identity", "new", name, "--address", "a:7000").exit_code == 0
    text = call(
        "identity", "federation", *(f"{name}.member.yaml" for name in ("no", "se", "off", "y"))
    ).out
    for written in (text, text.replace('"', "")):
        Path("federation.yaml").write_text(written)
        federation = Federation.load("federation.yaml")
        assert set(federation.members) == {"no", "se", "off", "y"}
        assert Identity.load("no", "no.key", federation).name == "no"
