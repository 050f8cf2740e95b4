"""A member's key file: made, read, described.

A key file holds a private key and its self-signed certificate. The certificate counts for the name
under which the federation file lists it, and can vouch for nothing but itself.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from dlora.errors import IdentityError
from dlora.identity.certificates import (
    NEW,
    as_der,
    concern,
    fingerprint,
    make,
    of_key_file,
    owner_of,
    validity,
)
from dlora.identity.federation import (
    Federation,
    Role,
    checked_member,
    checked_name,
    entry_text,
    read_members,
)
from dlora.identity.files import create_file, read_text


@dataclass(frozen=True)
class Identity:
    """This member's name, key and certificate."""

    name: str
    key_pem: bytes = field(repr=False)  # stays out of every log
    certificate_pem: bytes

    @classmethod
    def load(cls, name: str, key_path: str | Path, federation: Federation) -> Identity:
        """Read a key file and check that the others take it for ``name``. Raises IdentityError;
        warns if others can read it.
        """
        num_listed = len(federation.member(name).certificates)
        key_pem, certificate = _read_key_file(Path(key_path))
        der, source = as_der(certificate), federation.source
        if not federation.is_listed(name, der):
            for owner in (
                owner for owner in federation.members if federation.is_listed(owner, der)
            ):
                advice = f"give {name}'s key file, or the name {owner}"
                raise IdentityError(
                    f"wrong key for the name: {key_path} is the key of {owner}, not of {name};"
                    f" {advice}"
                )
            advice = "put its member file into the federation file, here and at the others"
            raise IdentityError(
                f"the certificate in {key_path} is not among the {num_listed} of {name} in"
                f" {source}; {advice}"
            )
        state, begin, end, now = validity(certificate)
        if state == "not yet valid":
            raise IdentityError(
                f"the certificate in {key_path} is valid from {begin}, here it is {now}; set the"
                " clock"
            )
        if state == "expired":
            raise IdentityError(
                f"the certificate in {key_path} expired at {end}, here it is {now}; {NEW} {name}"
            )
        _warn_of_the_end(certificate, key_path, name)
        return cls(name, key_pem, certificate.encode())


def new_identity(
    name: str, address: str | None, role: Role, folder: str | Path
) -> tuple[Path, Path]:
    """Write ``NAME.key`` (mode 0600; stays here) and ``NAME.member.yaml`` (goes to the others) into
    ``folder``.

    Raises IdentityError; never overwrites a file.
    """
    private_pem, pem = make(checked_name(name, "a new identity"))
    tree = {"name": name, "role": role, "address": address or "null", "certificates": [pem]}
    key_path, member_path = Path(folder, f"{name}.key"), Path(folder, f"{name}.member.yaml")
    create_file(member_path, entry_text(checked_member(tree, "a new identity")), 0o644)
    try:
        create_file(key_path, private_pem + pem, 0o600)
    except BaseException:
        member_path.unlink()  # of a key that nobody has
        raise
    return key_path, member_path


def describe(path: str | Path) -> str:
    """What a key, member or federation file says, for people; nothing of a private key.

    Raises IdentityError; warns of a key that others can read and of a certificate that ends soon.
    """
    if "PRIVATE KEY" in read_text(Path(path)):
        certificate = _read_key_file(Path(path))[1]
        told = [(owner_of(certificate), " (a key file)", certificate)]
    else:
        members = read_members(Path(path))[0]
        told = [
            (m.name, f" ({m.role}, {m.address or 'only dials'})", pem)
            for m in members
            for pem in m.certificates
        ]
    lines = []
    for name, head, certificate in told:
        state, begin, end, _ = validity(certificate)
        lines += [
            name + head,
            f"  {state}: from {begin} until {end}",
            f"  {fingerprint(certificate)}",
        ]
        if state == "valid":
            _warn_of_the_end(certificate, path, name)
    return "\n".join(lines)


def _warn_of_the_end(certificate: str, path: str | Path, name: str) -> None:
    worry = concern(certificate)
    if worry is not None:
        warnings.warn(
            f"the certificate of {name} in {path} {worry[1]}; before that, {NEW} {name}",
            stacklevel=3,
        )


def _read_key_file(path: Path) -> tuple[bytes, str]:
    """The file, which gRPC takes for the private key as it is, and the certificate in it; warns if
    others can read it.
    """
    text = read_text(path)
    certificate = of_key_file(text, path)
    if path.stat().st_mode & 0o077:
        warnings.warn(
            f"others on this machine can read or change {path}; run: chmod 600 {path}", stacklevel=3
        )
    return text.encode(), certificate
