"""Who is who without a centre: keys, certificates and the federation file, and what is wrong with
those that are refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from dlora.errors import IdentityError
from dlora.identity import certificates
from dlora.identity import federation as federation_file
from dlora.identity.certificates import fingerprint
from dlora.identity.federation import Federation, FederationFile, Member, federation_text
from dlora.identity.keys import Identity, new_identity
from kit.call_cli import call, contents

ADDRESSES = {
    "anna": "anna.example.org:7000",
    "bob": None,
    "carol": "[2001:db8::1]:7000",
    "dave": None,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The text of the key file and of the member file of each member."""
    folder = tmp_path_factory.mktemp("made")
    files = {
        name: new_identity(name, address, "peer", folder) for name, address in ADDRESSES.items()
    }
    return {name: (key.read_text(), member.read_text()) for name, (key, member) in files.items()}


@pytest.fixture
def work(made: dict[str, tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds the files of anna, bob and carol, and the federation of the three;
    dave is a stranger.
    """
    monkeypatch.chdir(tmp_path)
    for name, (key, member) in made.items():
        write(f"{name}.key", key)
        Path(f"{name}.member.yaml").write_text(member)
    members = [f"{name}.member.yaml" for name in ("anna", "bob", "carol")]
    Path("federation.yaml").write_text(federation_text(members))
    return tmp_path


def write(path: str, text: str) -> str:
    Path(path).write_text(text)
    Path(path).chmod(0o600)
    return path


def refusal(action: Any, *says: str) -> None:
    with pytest.raises(IdentityError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in says if part not in message] == [], message


def certificate_of(member: str) -> str:
    [pem] = yaml.safe_load(member)["certificates"]
    assert isinstance(pem, str)
    return pem


def at(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """From now on the clock of this machine is that many days ahead (behind, when negative)."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=days)

    monkeypatch.setattr(certificates, "datetime", Shifted)


class Shape(NamedTuple):
    """What a certificate says; as it stands, what ``new_identity`` makes."""

    name: str = "anna"
    ca: bool = False
    ca_critical: bool = True
    may_sign_certificates: bool = False
    usage_critical: bool = True
    alternatives: tuple[str, ...] = ("anna",)
    issuer: str = "anna"
    ed25519: bool = False


def forge(shape: Shape) -> str:
    key = (
        ed25519.Ed25519PrivateKey.generate()
        if shape.ed25519
        else ec.generate_private_key(ec.SECP256R1())
    )
    subject, issuer = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)])
        for n in (shape.name, shape.issuer)
    )
    now = datetime.now(UTC)
    usages = (
        "crl_sign",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
    )
    usage = x509.KeyUsage(
        **dict.fromkeys((*usages, "decipher_only"), False),
        digital_signature=True,
        key_cert_sign=shape.may_sign_certificates,
    )
    purposes = [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH, x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        x509.CertificateBuilder(
            issuer,
            subject,
            key.public_key(),
            x509.random_serial_number(),
            now,
            now + timedelta(days=9),
        )
        .add_extension(usage, shape.usage_critical)
        .add_extension(x509.BasicConstraints(ca=shape.ca, path_length=None), shape.ca_critical)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name) for name in shape.alternatives]),
            critical=False,
        )
    )
    signed = builder.sign(key, None if shape.ed25519 else hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM).decode()


def entry(
    name: Any = "anna", role: Any = "peer", address: Any = None, certificates: Any = ()
) -> dict[str, Any]:
    return {"name": name, "role": role, "address": address, "certificates": list(certificates)}


# --- what is made
# --------------------------------------------------------------------------------------------------


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


# --- names, roles, addresses
# -----------------------------------------------------------------------------------------

letters = st.sampled_from("abcXYZ019-_.")


@given(st.text(letters, max_size=70) | st.text(max_size=5))
def test_a_name_is_a_file_name_and_a_host_name(name: str) -> None:
    try:
        federation_file.checked_name(name, "here")
    except IdentityError as error:
        assert "\n" not in str(error) and str(error).startswith("here: name is ")
    else:
        assert (
            name.isascii()
            and len(name) <= 63
            and name[0].isalnum()
            and name[-1].isalnum()
            and ".." not in name
        )
        assert Path(name).name == name
        x509.DNSName(name)


@pytest.mark.parametrize("name", ["a", "7", "clinic-3", "St_Mary.north", "no", "x" * 63, "a--b"])
def test_names_that_are_fine(name: str, tmp_path: Path) -> None:
    key, member = new_identity(name, None, "device", tmp_path)
    (tmp_path / "federation.yaml").write_text(federation_text([member]))
    federation = Federation.load(tmp_path / "federation.yaml")
    assert list(federation.members) == [name]
    assert federation.member(name).role == "device"
    assert Identity.load(name, key, federation).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "-a",
        "a-",
        "a.",
        "a..b",
        "a/b",
        "a b",
        "x" * 64,
        "ä",
        "a\n",
        "10.0.0.1",
        "CN=a,b",
    ],
)
def test_names_that_are_not(name: str, tmp_path: Path) -> None:
    refusal(
        lambda: new_identity(name, None, "peer", tmp_path), f"name is {name!r}"[:40], "1 to 63 of"
    )
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "address",
    ["localhost:1", "10.0.0.1:65535", "[::1]:7000", "a.b-c.example:7000", "under_score:80"],
)
def test_addresses_that_are_fine(address: str, tmp_path: Path) -> None:
    _, member = new_identity("anna", address, "cloud", tmp_path)
    (tmp_path / "federation.yaml").write_text(federation_text([member]))
    found = Federation.load(tmp_path / "federation.yaml").member("anna")
    assert (found.address, found.role) == (address, "cloud")


@pytest.mark.parametrize(
    "address",
    [
        "host",
        "host:",
        ":7000",
        "host:0",
        "host:65536",
        "host:07",
        "host:7e3",
        "::1:7000",
        "[::1]",
        "[10.0.0.1]:1",
        "[fe80::1%2]:1",
    ]
    + [
        "300.0.0.1:7000",
        "10.1:7000",
        "ho st:7000",
        "https://host:7000",
        "-o:1",
        "a..b:1",
        "0.0.0.0:7000",
        "[::]:7000",
        "h:٣",
    ],
)
def test_addresses_that_are_not(address: str, tmp_path: Path) -> None:
    refusal(
        lambda: new_identity("anna", address, "peer", tmp_path),
        f"address is {address!r}",
        "HOST:PORT that others dial",
    )
    assert contents(tmp_path) == {}


@given(st.text(st.sampled_from("ab01.:[]-_"), max_size=20) | st.text(max_size=5))
def test_an_address_is_taken_as_it_stands_or_refused_in_one_line(address: str) -> None:
    try:
        taken = federation_file._address(address, "here")
    except IdentityError as error:
        assert "\n" not in str(error)
    else:
        assert taken == address or (taken is None and address in ("", "~"))
        if taken:
            assert 0 < int(taken.rpartition(":")[2]) < 65536


def test_a_role_that_is_none(tmp_path: Path) -> None:
    role: Any = "pear"
    refusal(
        lambda: new_identity("anna", None, role, tmp_path), "role is 'pear'", "peer, cloud, device"
    )
    assert contents(tmp_path) == {}


# --- the federation file
# --------------------------------------------------------------------------------------------------


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


# --- rotation
# --------------------------------------------------------------------------------------------------


def renew(folder: str = "new", address: str | None = ADDRESSES["anna"]) -> str:
    Path(folder).mkdir()
    return str(new_identity("anna", address, "peer", folder)[1])


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


# --- the key file
# --------------------------------------------------------------------------------------------------


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


# --- a federation file that changes
# ----------------------------------------------------------------------------------


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


# --- with gRPC itself
# --------------------------------------------------------------------------------------------------


class Answers(grpc.GenericRpcHandler):
    """Every call is answered with the certificate that the caller presented."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: context.auth_context()["x509_pem_cert"][0]
        )


def serve(own: Identity, federation: Federation, names: list[str]) -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Answers()])
    pair = [(own.key_pem, own.certificate_pem)]
    credentials = grpc.ssl_server_credentials(
        pair, federation.trusted(names), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return server, port


@pytest.fixture
def bob_listens(work: Path) -> Iterator[tuple[int, Federation]]:
    """The port of bob, who trusts the old and the new certificate of anna, and that federation."""
    with pytest.warns(UserWarning):
        text = federation_text(["federation.yaml", renew()])
    federation = Federation.load(write("both.yaml", text))
    server, port = serve(Identity.load("bob", "bob.key", federation), federation, ["anna"])
    yield port, federation
    server.stop(None).wait()


def ask(port: int, key: str, certificate: str, roots: bytes, target: str) -> str:
    """The certificate that the one at ``port`` saw, when ``target`` is proved to be there."""
    credentials = grpc.ssl_channel_credentials(roots, key.encode(), certificate.encode())
    options = [("grpc.ssl_target_name_override", target)]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/a/b")
        return ask(b"", timeout=10).decode()


@pytest.mark.parametrize("key", ["anna.key", "new/anna.key"])
def test_grpc_takes_the_old_and_the_new_key_both_ways(
    key: str, bob_listens: tuple[int, Federation]
) -> None:
    port, federation = bob_listens
    anna = Identity.load("anna", key, federation)
    proof = anna.key_pem.decode(), anna.certificate_pem.decode()
    assert ask(port, *proof, federation.trusted(["bob"]), "bob") == proof[1]
    server, port_of_anna = serve(anna, federation, ["bob"])
    bob = Identity.load("bob", "bob.key", federation)
    ask(
        port_of_anna,
        bob.key_pem.decode(),
        bob.certificate_pem.decode(),
        federation.trusted(["anna"]),
        "anna",
    )
    server.stop(None).wait()


def test_grpc_refuses_strangers_and_other_names(
    bob_listens: tuple[int, Federation], made: dict[str, tuple[str, str]]
) -> None:
    port, federation = bob_listens
    anna = Identity.load("anna", "anna.key", federation)
    proof = anna.key_pem.decode(), anna.certificate_pem.decode()
    for key, certificate, trusted, target in (
        (made["dave"][0], certificate_of(made["dave"][1]), "bob", "bob"),  # a stranger dials
        # a member that is no neighbour dials
        (made["carol"][0], certificate_of(made["carol"][1]), "bob", "bob"),
        (*proof, "carol", "carol"),  # who listens is not who was meant
        (*proof, "bob", "carol"),
        (*signed_by_anna(made), "bob", "bob"),  # a neighbour signs in another's name
    ):
        with pytest.raises(grpc.RpcError) as caught:
            ask(port, key, certificate, federation.trusted([trusted]), target)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert ask(port, *proof, federation.trusted(["bob"]), "bob")  # and bob still serves


def signed_by_anna(made: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """A fresh key, and a certificate in bob's name that anna's key signed, with anna's behind
    it.
    """
    signer = serialization.load_pem_private_key(made["anna"][0].encode(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    issuer, subject = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("anna", "bob")
    )
    number, end = x509.random_serial_number(), now + timedelta(days=1)
    builder = x509.CertificateBuilder(
        issuer, subject, key.public_key(), number, now - timedelta(days=1), end
    )
    signed = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("bob")]), False).sign(
        signer, hashes.SHA256()
    )
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    chain = signed.public_bytes(serialization.Encoding.PEM).decode() + certificate_of(
        made["anna"][1]
    )
    return key.private_bytes(serialization.Encoding.PEM, *plain).decode(), chain


# --- from the command line
# --------------------------------------------------------------------------------------------------


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
