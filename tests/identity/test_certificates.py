"""Certificates that are not dlora's, that end soon or not yet begin: what is said of them, and to
whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dlora.errors import IdentityError
from dlora.identity import certificates
from dlora.identity.federation import Federation, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.wire.frame import Link
from kit.call_cli import call
from kit.loopback import Loopback, run, running


@contextlib.contextmanager
def clock_ahead(**by: float) -> Iterator[None]:
    """The clock with which certificates are made and judged is ahead; behind, where negative. TLS
    has its own.
    """

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(**by)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "datetime", Shifted)
        yield


def made(name: str, folder: Path, left_s: float) -> None:
    """The files of a member whose certificate ends in ``left_s``."""
    with clock_ahead(days=-certificates.VALIDITY_DAYS, seconds=left_s):
        new_identity(name, "127.0.0.1:7000", "peer", folder)


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and text.endswith("\n"), text
    return text


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


# A time that ends


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    ("left_s", "says"),
    [
        (64, r"in \d\d s\b"),
        (1800, r"in (29|30) minutes\b"),
        (3 * 86_400, r"in 3 days\b"),
        (20 * 86_400, None),
    ],
)
def test_a_certificate_that_ends_soon_is_warned_of(
    left_s: float, says: str | None, tmp_path: Path
) -> None:
    """Field case 44: by `identity show` of the key and of the federation file, and whenever a run
    takes the key.
    """
    made("north", tmp_path, left_s + 0.9)
    federation = tmp_path / "federation.yaml"
    federation.write_text(federation_text([tmp_path / "north.member.yaml"]))
    for file in (tmp_path / "north.key", federation):
        outcome = call("identity", "show", file)
        assert outcome.exit_code == 0
        if says is None:
            assert outcome.err == ""
        else:
            assert re.search(says, one_line(outcome.err)) and "identity new north" in outcome.err
    with warnings.catch_warnings(record=True) as warned:
        Identity.load("north", tmp_path / "north.key", Federation.load(federation))
    assert [str(warning.message)[:24] for warning in warned] == (
        [] if says is None else ["the certificate of north"]
    )


class Watched(Loopback):
    """a listens, b dials; what the networks tell of certificates."""

    def __init__(self, folder: Path, prepare: Callable[[Path], object]) -> None:
        super().__init__(folder, listening="a")
        for name in "ab":
            for file in (f"{name}.key", f"{name}.member.yaml"):
                (folder / file).unlink()
        prepare(folder)
        self.path.write_text(federation_text([folder / f"{name}.member.yaml" for name in "ab"]))
        self.told: dict[str, list[str]] = {"a": [], "b": []}

    def identity(self, name: str) -> Identity:
        """Whatever the time is: here the network is to find out."""
        pem = (self.folder / f"{name}.key").read_text()
        return Identity(name, pem.encode(), pem[pem.index("-----BEGIN CERT") :].encode())

    def network(self, name: str, **overrides: Any) -> Any:
        told = self.told[name].append
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Identity, "load", lambda name, *_: self.identity(name))
            return super().network(name, on_certificate=told, **overrides)

    async def meet(self, until: Callable[[], bool]) -> list[str]:
        """Serve both until something is true; who got a conversation."""
        talked: list[str] = []

        async def talk(name: str, link: Link) -> None:
            talked.append(name)
            await link.receive()

        async with self.serve("a", talk), running(self.network("b").serve(talk)):
            while not until():
                await asyncio.sleep(0.01)
        return talked


def pair_of(ends: dict[str, float]) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        for name, left_s in ends.items():
            made(name, folder, left_s)

    return prepare


DAY_S = 86_400.0


def test_a_running_owner_and_its_neighbours_are_told_that_a_certificate_ends(
    tmp_path: Path,
) -> None:
    """Field case 44: at each stage once, and at the end; the link that is up goes on."""
    watched = Watched(tmp_path, pair_of({"a": 100 * DAY_S, "b": 2 * DAY_S + 5}))

    def both() -> bool:
        return bool(watched.told["a"] and watched.told["b"])

    run(_quietly(watched, both))
    assert len(watched.told["a"]) == len(watched.told["b"]) == 1
    assert (
        watched.told["b"][0].startswith("our certificate, of b, ends at 20")
        and "in 2 days" in watched.told["b"][0]
    )
    assert (
        watched.told["a"][0].startswith("the certificate of b ends at 20")
        and "dlora identity new b" in watched.told["a"][0]
    )


async def _quietly(watched: Watched, until: Callable[[], bool]) -> None:
    await watched.meet(until)


def test_each_stage_is_told_once(tmp_path: Path) -> None:
    """Field case 44: a run of 20 days, in which nobody renews anything."""
    from dlora.net.watch import Watch

    made("a", tmp_path, 20 * DAY_S)
    pem = (tmp_path / "a.key").read_text()
    told: list[str] = []
    watch = Watch(Identity("a", b"", pem[pem.index("-----BEGIN CERT") :].encode()), told.append)
    nobody = Federation({})
    for hour in range(24 * 21):
        with clock_ahead(hours=hour):
            watch.look(nobody, ())
    spans = [line.split(", in ")[1].split(";")[0] for line in told[:-1]]
    assert spans == ["14 days", "3 days", "24 hours", "6 hours", "60 minutes"]
    assert "expired at 20" in told[-1] and len(told) == 6


def test_a_certificate_that_ended_during_the_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field case 30: both ends say whose it is, where TLS tells the one who dials no more than that
    the line went dead.
    """
    monkeypatch.setattr("dlora.net.options.HANG_UPS", 2)
    watched = Watched(tmp_path, pair_of({"a": 100 * DAY_S, "b": -60.0}))
    talked: list[str] = []

    async def main() -> None:
        talked.extend(
            await watched.meet(
                lambda: bool(watched.told["a"] and watched.told["b"] and watched.refused)
            )
        )

    run(main())
    assert talked == []
    assert "our certificate, of b, expired at 20" in watched.told["b"][0]
    assert "the certificate of b expired at 20" in watched.told["a"][0]
    assert (
        watched.refused[0].startswith("dialling a: it hangs up in the handshake: ")
        and "clocks is wrong" in watched.refused[0]
    )


def test_a_clock_that_is_an_hour_behind_is_named(tmp_path: Path) -> None:
    """Field case 30: b was made just now on a machine whose clock is right, and a's is an hour
    behind.
    """

    def ahead(folder: Path) -> None:
        new_identity("a", None, "peer", folder)
        with clock_ahead(hours=1):
            new_identity("b", None, "peer", folder)

    watched = Watched(tmp_path, ahead)
    run(_quietly(watched, lambda: bool(watched.told["a"])))
    [line] = watched.told["a"]
    assert line.startswith("the certificate of b is valid from 20")
    assert line.endswith("UTC: the clock here is behind, or its maker's was ahead")


def test_an_own_certificate_of_the_future_is_refused_before_a_run(tmp_path: Path) -> None:
    """Field case 30."""
    with clock_ahead(hours=1):
        new_identity("north", None, "peer", tmp_path)
    (tmp_path / "federation.yaml").write_text(federation_text([tmp_path / "north.member.yaml"]))
    with pytest.raises(IdentityError, match=r"is valid from 20.*here it is 20.*set the clock"):
        Identity.load(
            "north", tmp_path / "north.key", Federation.load(tmp_path / "federation.yaml")
        )
