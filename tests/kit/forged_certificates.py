"""What a certificate can say, well made or not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519


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
