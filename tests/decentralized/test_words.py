"""What is shown of a neighbour's word when there is no signature, or when its certificate was
renewed since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dlora.decentralized.peer.ledger import Ledger
from dlora.decentralized.peer.messages_on_disk import round_message
from dlora.decentralized.peer.word import Words, statement
from dlora.errors import RunError
from dlora.identity.federation import Federation, FederationFile, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.identity.signatures import MemberSignatures
from dlora.run.findings import Findings
from dlora.wire.peer.frames import Hello
from kit import virtual_clock
from kit.any_event import any_event
from kit.older_copies import older_copy_of
from kit.virtual_federation import FaultyLedger, World

RUN = "0" * 64


class EarlierLedger(FaultyLedger):
    """It keeps neither the neighbour's signature nor its ledger's id, as an earlier dlora did."""

    def record(self, round: int, neighbour: str, state: Any, *more: Any) -> None:
        super().record(round, neighbour, state)


class EarlierWorld(World):
    def make_ledger(self, name: str) -> FaultyLedger:
        (self.folder / name / "id").unlink(missing_ok=True)  # it follows from the first line
        return EarlierLedger(self, name)


@pytest.mark.usefixtures("disk_of_a_virtual_world")
@pytest.mark.parametrize(("num_peers", "victim"), [(2, "a"), (2, "b"), (4, "b")])
def test_without_signatures_an_older_copy_is_only_reported(
    num_peers: int, victim: str, tmp_path: Path
) -> None:
    """Field case 42: nobody can prove it, so nobody ends; the warning has the neighbour's name."""
    world = EarlierWorld(tmp_path, num_peers=num_peers, rounds=8)
    virtual_clock.run(world.run(older_copy_of(victim)))
    assert world.ended is None  # type: ignore[attr-defined]
    assert set(world.results) == set(world.names) and not world.broken
    told = [fields for name in world.names for fields in world.story_of(name, "lacks")]
    assert told and {(fields["neighbour"], fields["shown"]) for fields in told} == {(victim, 0)}
    findings = Findings("north", num_peers, lambda event: None)
    findings(any_event("lacks", **told[0]))
    [warning] = findings.warnings(num_peers)
    assert warning.startswith(f"{victim}: its folder does not hold what is mixed here")


def renewed_with_the_same_key(folder: Path) -> None:
    """Another certificate of south's old key, as a program other than dlora may make one."""
    key = serialization.load_pem_private_key((folder / "south.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    tree = yaml.safe_load((folder / "south.member.yaml").read_text())
    old = x509.load_pem_x509_certificate(tree["certificates"][0].encode())
    builder = x509.CertificateBuilder(
        old.issuer, old.subject, key.public_key(), x509.random_serial_number(),
        old.not_valid_before_utc, old.not_valid_after_utc - timedelta(days=1),
    )  # fmt: skip
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    text = (folder / "south.key").read_text()
    (folder / "south.key").write_text(text[: text.index("-----BEGIN CERT")] + pem)
    (folder / "south.member.yaml").write_text(yaml.safe_dump(tree | {"certificates": [pem]}))


def renewed_and_both_are_listed(folder: Path) -> None:
    (folder / "new").mkdir()
    new_identity("south", "127.0.0.1:7001", "peer", folder / "new")
    with pytest.warns(UserWarning, match="south has certificates from"):
        text = federation_text([folder / "south.member.yaml", folder / "new" / "south.member.yaml"])
    (folder / "south.member.yaml").write_text(text)
    (folder / "new" / "south.key").replace(folder / "south.key")


def renewed_and_the_old_one_is_gone(folder: Path) -> None:
    for name in ("south.key", "south.member.yaml"):
        (folder / name).unlink()
    new_identity("south", "127.0.0.1:7001", "peer", folder)


@pytest.mark.parametrize(
    ("renew", "shown"),
    [
        (lambda folder: None, 1),
        (renewed_with_the_same_key, 1),
        (renewed_and_both_are_listed, 1),
        (renewed_and_the_old_one_is_gone, 0),
    ],
)
def test_a_word_counts_while_a_certificate_of_its_key_is_listed(
    renew: Callable[[Path], None], shown: int, tmp_path: Path
) -> None:
    """Field case 42: south has signed, renews its certificate, and comes with an empty ledger.

    A signature is checked with the keys that the federation file lists now. The key may stay; a new
    one is beside the old as long as both are listed. After that the neighbour only reports.
    """
    new_identity("north", "127.0.0.1:7000", "peer", tmp_path)
    new_identity("south", "127.0.0.1:7001", "peer", tmp_path)

    def words(name: str, ledger: Ledger, report: Callable[..., object]) -> Words:
        path = tmp_path / "federation.yaml"
        path.write_text(
            federation_text([tmp_path / f"{name}.member.yaml" for name in ("north", "south")])
        )
        identity = Identity.load(name, tmp_path / f"{name}.key", Federation.load(path))
        return Words(name, RUN, ledger, MemberSignatures(identity, FederationFile(path)), report)

    reports: list[Any] = []
    report = reports.append

    with opened(tmp_path / "of north") as north, opened(tmp_path / "of south") as south:
        own = north.keep(round_message(0), b"north's").sha256
        theirs = hashlib.sha256(b"south's").hexdigest()
        partial = north.partial("south", round_message(0), theirs)
        partial.write_bytes(b"south's")
        north.arrived("south", round_message(0), partial)
        signed = statement(RUN, "south", south.id, "north", 0, theirs, own)
        word = words("south", south, report).signatures.sign(signed)
        north.record(0, "south", "committed", south.id, word)
        renew(tmp_path)
        told = words("north", north, report).lacking("south", Hello(RUN, "{}", 0, south.id))
        assert len(told) == shown
        [lacks] = reports
        assert (lacks["event"], lacks["neighbour"], lacks["shown"]) == ("lacks", "south", shown)
        if shown:  # and south takes it for its own word, with its new key too
            with pytest.raises(RunError, match="is an older copy, or the key of south is used"):
                words("south", south, report).is_to_restore("north", told[0], 0)


@contextmanager
def opened(folder: Path) -> Iterator[Ledger]:
    ledger = Ledger(folder)
    try:
        yield ledger
    finally:
        ledger.close()
