"""Which certificate a member may have, whether it is good now, and for how long.

A certificate is ECDSA P-256, signed by itself, and can vouch for nothing else. Keys and
certificates of another form, such as RSA keys and leaves of a hospital's own authority, are refused
with what came and what is taken.
"""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from dlora.errors import IdentityError

VALIDITY_DAYS = 730
CLOCK_SLACK_MINUTES = 10  # a neighbour whose clock is behind by less finds a new certificate valid
# before the end; each is told of once
STAGES_S = (14 * 86_400, 3 * 86_400, 86_400, 6 * 3600, 3600, 600)
NEW = "make a new one with: dlora identity new"
_TAKEN = (
    "dlora takes a certificate that an ECDSA P-256 key has signed for itself, no other key and no"
    " authority's signature"
)


def make(name: str) -> tuple[str, str]:
    """A new private key and its certificate for ``name``, both PEM.

    ECDSA P-256, because gRPC for Python fails with Ed25519.
    """
    subject = x509.Name.from_rfc4514_string(f"CN={name}")
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC).replace(microsecond=0)
    builder = x509.CertificateBuilder(
        subject, subject, key.public_key(), x509.random_serial_number()
    )
    builder = builder.not_valid_before(now - timedelta(minutes=CLOCK_SLACK_MINUTES))
    builder = builder.not_valid_after(now + timedelta(days=VALIDITY_DAYS))
    for extension, critical in _extensions(name):
        builder = builder.add_extension(extension, critical)
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private_pem = key.private_bytes(serialization.Encoding.PEM, *plain).decode()
    return private_pem, as_pem(builder.sign(key, hashes.SHA256()))


def as_pem(certificate: x509.Certificate) -> str:
    """The certificate without the text that stood around it."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def as_der(pem: str) -> bytes:
    """The certificate in the bytes that TLS sends."""
    return _parse(pem).public_bytes(serialization.Encoding.DER)


def owner_of(pem: str) -> str:
    """The name that a certificate was made for."""
    return _owner(_parse(pem))


def fingerprint(pem: str) -> str:
    """SHA-256 of the certificate's DER: 16 groups of 4 hex digits, to be read out over the
    phone.
    """
    return _parse(pem).fingerprint(hashes.SHA256()).hex(":", 2)


def checked(pem: Any, name: str, where: str) -> str:
    """A certificate as PEM again, when it is one that `make` makes for ``name``. Raises
    IdentityError with what came.
    """
    try:
        certificate = _parse(pem)
        owner = _owner(certificate)
        certificate.verify_directly_issued_by(certificate)
        found = [
            certificate.extensions.get_extension_for_class(type(value))
            for value, _ in _extensions(owner)
        ]
        fits = [(extension.value, extension.critical) for extension in found] == _extensions(owner)
        fits = fits and certificate.subject == x509.Name.from_rfc4514_string(f"CN={owner}")
        fits = fits and isinstance(getattr(certificate.public_key(), "curve", None), ec.SECP256R1)
    # a stranger's bytes; cryptography has a dozen exceptions for them without a common root
    except Exception as error:
        came = _came(pem)
        told = f"; this is {came}: {_TAKEN}" if came else ""
        damaged = told or "; if the file is damaged, copy it again from who sent it"
        raise IdentityError(
            f"{where}: not exactly one certificate in PEM that can be read{damaged}; else {NEW}"
        ) from error
    if not fits:
        came = _came(pem)
        told = f"; this is {came}: {_TAKEN}" if came else ""
        raise IdentityError(
            f"{where}: not a certificate of the form that dlora makes, which cannot sign"
            f" others{told}; {NEW}"
        )
    if owner != name:
        raise IdentityError(
            f"{where}: the certificate was made for {owner}, not for {name}; each member needs one"
            " of its own"
        )
    return as_pem(certificate)


def of_key_file(text: str, path: object) -> str:
    """The certificate of a key file, PEM; it belongs to the private key beside it. Raises
    IdentityError with what came.
    """
    wanted = "a private key without a password and its certificate, both PEM"
    try:
        key, certificate = serialization.load_pem_private_key(text.encode(), None), _parse(text)
        owner, belongs = _owner(certificate), key.public_key() == certificate.public_key()
    except Exception as error:  # as above
        came = _came(text)
        told = f"; this is {came}: {_TAKEN}" if came else ""
        raise IdentityError(f"{path} is not a key file ({wanted}{told}); {NEW}") from error
    if not belongs:
        raise IdentityError(
            f"the key in {path} does not belong to the certificate of {owner} beside it; {NEW}"
            f" {owner}"
        )
    if (came := _came(text)) is not None:
        raise IdentityError(
            f"{path} is not a key file of dlora: this is {came}: {_TAKEN}; {NEW} NAME"
        )
    return as_pem(certificate)


def validity(pem: str) -> tuple[str, str, str, str]:
    """Valid, expired or not yet valid; from when, until when, and the time here."""
    begin_at, end_at = _period(pem)
    now = datetime.now(UTC)
    state = "not yet valid" if now < begin_at else "expired" if now > end_at else "valid"
    begin, end, here = (f"{moment:%Y-%m-%d %H:%M} UTC" for moment in (begin_at, end_at, now))
    return state, begin, end, here


def concern(pem: str) -> tuple[int, str] | None:
    """What is wrong with a certificate's time, or will be soon, as the middle of a sentence; None
    where all is well. The number beside it grows when the user should be told again: at each of
    ``STAGES_S`` before the end, and at the end.
    """
    state, begin, end, here = validity(pem)
    if state == "not yet valid":
        return (
            -1,
            (
                f"is valid from {begin}, here it is {here}: the clock here is behind, or its"
                " maker's was ahead"
            ),
        )
    if state == "expired":
        return len(STAGES_S) + 1, f"expired at {end}, here it is {here}"
    left_s = (_period(pem)[1] - datetime.now(UTC)).total_seconds()
    passed = sum(left_s <= stage_s for stage_s in STAGES_S)
    return (passed, f"ends at {end}, in {_span(left_s)}") if passed else None


def _span(seconds: float) -> str:
    for unit, size_s in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


@functools.lru_cache(maxsize=4096)
def _period(pem: str) -> tuple[datetime, datetime]:
    certificate = _parse(pem)
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _extensions(name: str) -> list[tuple[x509.ExtensionType, bool]]:
    """What every certificate must say, and whether it is critical. Without the first two it could
    sign in another's name.
    """
    # digital_signature comes first
    only_sign = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    san, constraints = (
        x509.SubjectAlternativeName([x509.DNSName(name)]),
        x509.BasicConstraints(ca=False, path_length=None),
    )
    return [
        (only_sign, True),
        (constraints, True),
        (x509.ExtendedKeyUsage(purposes), False),
        (san, False),
    ]


def _parse(pem: str) -> x509.Certificate:
    """The one certificate in a text; ValueError when there is none or another one hides behind
    it.
    """
    [certificate] = x509.load_pem_x509_certificates(pem.encode())
    return certificate


def _owner(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)


def _came(text: Any) -> str | None:
    """What stands in a text instead of our certificate, where another kind of key or certificate is
    recognised; None where there is nothing of the kind.
    """
    try:
        certificates = x509.load_pem_x509_certificates(text.encode())
        if len(certificates) > 1 and len({certificate.subject for certificate in certificates}) > 1:
            return f"a chain of {len(certificates)} certificates"
        [certificate] = certificates
        key: Any = certificate.public_key()
        if isinstance(key, rsa.RSAPublicKey):
            return f"an RSA key of {key.key_size} bits"
        if not isinstance(getattr(key, "curve", None), ec.SECP256R1):
            return (
                "a key of the kind"
                f" {getattr(getattr(key, 'curve', None), 'name', type(key).__name__)}"
            )
        if certificate.issuer != certificate.subject:
            return f"a certificate that {_shown(certificate.issuer)} has signed"
    except Exception:  # as above: bytes of anybody
        pass
    return None


def _shown(name: x509.Name) -> str:
    """A distinguished name, short, in ASCII: it goes to a terminal."""
    return ascii(name.rfc4514_string()[:80])[1:-1]
