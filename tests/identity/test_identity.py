"""Keys and certificates: what is made, how they are renewed, and what a key file must hold."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dlora.identity.certificates import fingerprint
from dlora.identity.federation import Federation, federation_text
from dlora.identity.keys import Identity, new_identity
from kit.call_cli import contents
from kit.identities import at, certificate_of, refusal, renew, write

# What is made


def test_a_new_certificate_can_vouch_for_nothing_but_itself(
    made: dict[str, tuple[str, str]],
) -> None:
    """Without exactly these critical extensions one member can sign a certificate in another's
    name.
    """
    certificate = x509.load_pem_x509_certificate(certificate_of(made["anna"][1]).encode())
    critical = {
        extension.oid.dotted_string: extension.value
        for extension in certificate.extensions
        if extension.critical
    }
    assert critical == {
        # keyUsage
        "2.5.29.15": x509.KeyUsage(True, False, False, False, False, False, False, False, False),
        "2.5.29.19": x509.BasicConstraints(ca=False, path_length=None),
    }
    usage = critical["2.5.29.15"]
    assert isinstance(usage, x509.KeyUsage) and usage.digital_signature and not usage.key_cert_sign
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName("anna")]
    assert certificate.subject.rfc4514_string() == certificate.issuer.rfc4514_string() == "CN=anna"
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    # server, client
    assert {purpose.dotted_string for purpose in purposes} == {
        "1.3.6.1.5.5.7.3.1",
        "1.3.6.1.5.5.7.3.2",
    }
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert lifetime == timedelta(days=730, minutes=10)
    begun = datetime.now(UTC) - certificate.not_valid_before_utc
    assert timedelta(minutes=10) <= begun < timedelta(minutes=20)


def test_serials_and_keys_are_never_the_same(work: Path) -> None:
    Path("again").mkdir()
    new_identity("anna", None, "peer", "again")
    pems = [Path(folder, "anna.member.yaml").read_text() for folder in (".", "again")]
    one, other = (x509.load_pem_x509_certificate(certificate_of(pem).encode()) for pem in pems)
    assert one.serial_number != other.serial_number
    assert one.public_key() != other.public_key()


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_the_key_file_is_the_owners_alone_from_its_first_byte(umask: int, tmp_path: Path) -> None:
    modes, os_open = [], os.open

    def spy(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        descriptor = os_open(path, flags, mode, **more)
        if str(path).endswith(".key"):
            modes.append(
                (
                    os.fstat(descriptor).st_mode & 0o777,
                    os.fstat(descriptor).st_size,
                    bool(flags & os.O_EXCL),
                )
            )
        return descriptor

    before = os.umask(umask)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", spy)
            key, member = new_identity("anna", None, "peer", tmp_path)
    finally:
        os.umask(before)
    assert modes == [(0o600, 0, True)]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "PRIVATE" in key.read_text() and "PRIVATE" not in member.read_text()


@pytest.mark.parametrize("existing", ["anna.key", "anna.member.yaml"])
def test_nothing_is_overwritten(existing: str, tmp_path: Path) -> None:
    (tmp_path / existing).write_text("dear")
    before = contents(tmp_path)
    refusal(
        lambda: new_identity("anna", None, "peer", tmp_path),
        existing,
        "never overwritten",
        "--folder",
    )
    assert contents(tmp_path) == before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "anna.key").symlink_to(tmp_path / "elsewhere")
    refusal(lambda: new_identity("anna", None, "peer", tmp_path), "anna.key", "never overwritten")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refusal(
        lambda: new_identity("anna", None, "peer", tmp_path / "no"),
        "anna.member.yaml",
        "No such file",
        "choose a folder",
    )


def test_the_fingerprint_is_the_sha256_of_the_der(made: dict[str, tuple[str, str]]) -> None:
    pem = certificate_of(made["anna"][1])
    der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(serialization.Encoding.DER)
    groups = fingerprint(pem).split(":")
    assert "".join(groups) == hashlib.sha256(der).hexdigest()
    assert [len(group) for group in groups] == [4] * 16


def test_an_old_and_a_new_certificate_overlap(work: Path, made: dict[str, tuple[str, str]]) -> None:
    renewed = renew()
    with pytest.warns(
        UserWarning,
        match=r"anna has certificates from federation.yaml and from new/anna.member.yaml; ask anna",
    ):
        text = federation_text(["federation.yaml", renewed])
    both = Federation.load(write("both.yaml", text))
    assert both.member("anna").certificates == (
        certificate_of(made["anna"][1]),
        certificate_of(Path(renewed).read_text()),
    )
    assert (
        Identity.load("anna", "anna.key", both).key_pem
        != Identity.load("anna", "new/anna.key", both).key_pem
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # nothing new, nothing to make sure of
        assert federation_text(["both.yaml", renewed]) == text


def test_two_files_of_one_member_must_agree(work: Path) -> None:
    moved = renew(address="other.example.org:7000")
    says = [
        "anna is peer at anna.example.org:7000 in anna.member.yaml",
        "peer at other.example.org:7000 in new/anna.member",
    ]
    refusal(lambda: federation_text(["anna.member.yaml", moved]), *says, "edit one")
    Path("role.yaml").write_text(
        Path("anna.member.yaml").read_text().replace("role: peer", "role: cloud")
    )
    refusal(
        lambda: federation_text(["anna.member.yaml", "role.yaml"]),
        "is peer at",
        "cloud at",
        "role.yaml",
    )


# The key file


def load(name: str = "anna", key: str = "anna.key") -> Identity:
    return Identity.load(name, key, Federation.load("federation.yaml"))


def test_a_key_file_is_all_it_takes(work: Path, made: dict[str, tuple[str, str]]) -> None:
    found = load()
    assert found.certificate_pem.decode() == certificate_of(made["anna"][1])
    assert "PRIVATE" in found.key_pem.decode() and "PRIVATE" not in repr(found)


def test_the_wrong_key_for_the_name(work: Path) -> None:
    refusal(
        lambda: load(key="bob.key"),
        "wrong key for the name: bob.key is the key of bob, not of anna",
        "give anna's",
    )
    refusal(
        lambda: load(key="dave.key"),
        "dave.key is not among the 1 of anna in federation.yaml",
        "put its member file",
    )
    refusal(lambda: load(name="dave", key="dave.key"), "dave is not a member in federation.yaml")


def test_what_is_no_key_file(work: Path, made: dict[str, tuple[str, str]]) -> None:
    key, _, certificate = made["anna"][0].partition("-----BEGIN CERTIFICATE")
    certificate = "-----BEGIN CERTIFICATE" + certificate
    encrypted = (
        serialization.load_pem_private_key(key.encode(), None)
        .private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
        .decode()
    )
    refusal(lambda: load(key="no.key"), "no.key cannot be read (No such file")
    for text in (
        "",
        "hello",
        key,
        certificate,
        encrypted + certificate,
        made["anna"][0] + certificate,
        made["anna"][0][:-100],
    ):
        refusal(
            lambda text=text: load(key=write("x.key", text)),
            "x.key is not a key file (a private key without a password",
        )
    refusal(lambda: load(key="anna.member.yaml"), "anna.member.yaml is not a key file")
    refusal(lambda: load(key=write("x.key", "#" * (1 << 21))), "more than 1,048,576 bytes")
    other = made["bob"][0].partition("-----BEGIN CERTIFICATE")[0]
    refusal(
        lambda: load(key=write("x.key", other + certificate)),
        "key in x.key does not belong to the certificate of anna",
    )


def test_a_clock_that_is_off(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = datetime.now(UTC)
    at(monkeypatch, days=-0.005)  # 7 minutes, which is forgiven
    load()
    at(monkeypatch, days=-2)
    there = f"{begin - timedelta(days=2):%Y-%m-%d }"
    refusal(load, "anna.key is valid from 20", f"here it is {there}", "set the clock")
    at(monkeypatch, days=715)
    load()
    at(monkeypatch, days=729)
    with pytest.warns(
        UserWarning,
        match="the certificate of anna in anna.key ends at 20.* in 24 hours; before that",
    ):
        load()
    at(monkeypatch, days=731)
    refusal(
        load,
        "anna.key expired at 20",
        f"here it is {begin + timedelta(days=731):%Y-%m-%d }",
        "dlora identity new anna",
    )


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_read_is_warned_of(mode: int, work: Path) -> None:
    Path("anna.key").chmod(mode)
    with pytest.warns(
        UserWarning,
        match="others on this machine can read or change anna.key; run: chmod 600 anna.key",
    ):
        load()
    Path("anna.key").chmod(0o400)
    load()  # filterwarnings makes any warning an error
