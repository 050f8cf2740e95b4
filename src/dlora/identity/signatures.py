"""Signatures of members: made with a member's own key, checked with the certificates that the
federation file lists.
"""

from __future__ import annotations

import functools

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from dlora.identity.federation import FederationFile
from dlora.identity.keys import Identity
from dlora.wire.peer.frames import SIGNATURE_BYTES

HALF_BYTES = SIGNATURE_BYTES // 2


class MemberSignatures:
    """ECDSA on P-256 with SHA-256, r and s as 32 bytes each; nothing is drawn at random (RFC
    6979).
    """

    def __init__(self, identity: Identity, federation: FederationFile) -> None:
        self.identity, self.federation = identity, federation
        key = serialization.load_pem_private_key(identity.key_pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey), "an identity has such a key"
        self._key = key

    def sign(self, statement: bytes) -> bytes:
        """This member's signature."""
        made = self._key.sign(statement, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
        return b"".join(
            number.to_bytes(HALF_BYTES, "big") for number in utils.decode_dss_signature(made)
        )

    def is_signed(self, name: str, statement: bytes, signature: bytes) -> bool:
        """Whether the signature fits one of the member's certificates: those in the federation file
        as it is now; for our own name also our own certificate.
        """
        member = self.federation.current.members.get(name)
        certificates = () if member is None else tuple(pem.encode() for pem in member.certificates)
        if name == self.identity.name:
            certificates += (self.identity.certificate_pem,)
        if len(signature) != SIGNATURE_BYTES:
            return False
        numbers = (
            int.from_bytes(half, "big") for half in (signature[:HALF_BYTES], signature[HALF_BYTES:])
        )
        written = utils.encode_dss_signature(*numbers)
        return any(_fits(pem, statement, written) for pem in dict.fromkeys(certificates))


def _fits(pem: bytes, statement: bytes, signature: bytes) -> bool:
    try:
        _key_of(pem).verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _key_of(pem: bytes) -> ec.EllipticCurvePublicKey:
    key = x509.load_pem_x509_certificate(pem).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey), "the federation file takes no others"
    return key
