"""Signatures of members: whose key made them is checked, whatever the bytes are."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlora.identity.federation import Federation, FederationFile, federation_text
from dlora.identity.keys import Identity, new_identity
from dlora.identity.signatures import MemberSignatures
from dlora.wire.peer.frames import SIGNATURE_BYTES


def test_a_signature_is_of_its_member_and_of_its_statement(tmp_path: Path) -> None:
    """Field case 42: nobody signs in another's name."""
    members = [
        new_identity(name, f"127.0.0.1:{port}", "peer", tmp_path)[1]
        for name, port in (("north", 7000), ("south", 7001))
    ]
    path = tmp_path / "federation.yaml"
    path.write_text(federation_text(members))
    file = FederationFile(path)
    north, south = (
        MemberSignatures(Identity.load(name, tmp_path / f"{name}.key", Federation.load(path)), file)
        for name in ("north", "south")
    )
    signature = north.sign(b"told")
    assert len(signature) == SIGNATURE_BYTES and north.sign(b"told") == signature, (
        "nothing is drawn at random"
    )
    for judge in (north, south):
        assert judge.is_signed("north", b"told", signature)
        assert not judge.is_signed("south", b"told", signature)
        assert not judge.is_signed("north", b"another", signature)
        assert not judge.is_signed("nobody", b"told", signature)


@pytest.mark.parametrize("signature", [b"", bytes(64), b"\xff" * 64, bytes(63), bytes(70)])
def test_any_bytes_are_no_signature(signature: bytes, tmp_path: Path) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(federation_text([new_identity("north", "127.0.0.1:7000", "peer", tmp_path)[1]]))
    signatures = MemberSignatures(
        Identity.load("north", tmp_path / "north.key", Federation.load(path)), FederationFile(path)
    )
    assert not signatures.is_signed("north", b"told", signature)
