"""Keys, certificates, the federation file.

A member's key file holds a private key and its self-signed certificate; the federation file lists who has which certificates
and is the only trust root. A certificate counts for the name it is listed under and can vouch for nothing but itself.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from textwrap import indent
from typing import Any, Literal, TypeAlias, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from dlora.errors import IdentityError
from dlora.yaml_file import TextLoader, read_yaml

Role: TypeAlias = Literal["peer", "cloud", "device"]

VALIDITY_DAYS = 730
CLOCK_SLACK_MINUTES = 10  # a neighbour whose clock is behind by less finds a new certificate valid
MAX_FILE_BYTES = 1 << 20  # of a key, member or federation file; a member takes about 1 KB

_NAME = re.compile(r"(?=.{1,63}\Z)[A-Za-z0-9]([A-Za-z0-9_-]|\.(?!\.))*(?<![._-])\Z", re.ASCII)
_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]|\.(?!\.))*\Z", re.ASCII)
_NEW = "make a new one with: dlora identity new"


@dataclass(frozen=True)
class Member:
    """What the federation knows of one member."""

    name: str
    role: Role
    address: str | None  # HOST:PORT; None: it can only dial out
    certificates: tuple[str, ...]  # PEM, each exactly one certificate


@dataclass(frozen=True)
class Federation:
    """Everyone who is trusted, by name."""

    members: dict[str, Member]
    source: str = field(default="the federation file", compare=False)  # its path, for messages

    @classmethod
    def load(cls, path: str | Path) -> Federation:
        """Read and check a federation file. Raises IdentityError naming file, member, what came and what to do."""
        members, is_federation = _read_members(Path(path))
        if not is_federation:
            raise IdentityError(f"{path} is the file of one member; make a federation file with: dlora identity federation")
        return cls(_merged([(member, str(path)) for member in members]), str(path))

    def dump(self) -> str:
        """The YAML that ``load`` reads; the same members give the same bytes, in whatever order they came."""
        return "members:\n" + "".join("- " + indent(_entry(self.members[name]), "  ")[2:] for name in sorted(self.members))

    def member(self, name: str) -> Member:
        """The member of that name. Raises IdentityError naming the nearest known one."""
        if name not in self.members:
            near = difflib.get_close_matches(name, self.members, n=1, cutoff=0.5)
            known = ", ".join(sorted(self.members)[:8]) + (", ..." if len(self.members) > 8 else "")
            advice = f"did you mean {near[0]}?" if near else "take one of these, or add its member file"
            raise IdentityError(f"{name} is not a member in {self.source}, which lists {known}; {advice}")
        return self.members[name]

    def is_listed(self, name: str, der: bytes) -> bool:
        """Whether this certificate, in DER, is one of those listed for that name; False for an unknown name."""
        listed = self.members[name].certificates if name in self.members else ()
        return hashlib.sha256(der).digest() in [_parse(pem).fingerprint(hashes.SHA256()) for pem in listed]

    def trusted(self, names: Iterable[str]) -> bytes:
        """The certificates of these members, PEM after PEM: the roots of a TLS connection with any of them."""
        return "".join(pem for name in names for pem in self.member(name).certificates).encode()

    def check_dialable(self, edges: Iterable[tuple[str, str]]) -> None:
        """Raises IdentityError when neither end of an edge has an address, or an end is no member."""
        for one, other in edges:
            if [self.member(end).address for end in (one, other)] == [None, None]:
                advice = "give one of them an address: HOST:PORT there, or take a topology in which they are no neighbours"
                raise IdentityError(f"{one} and {other} are neighbours but neither has an address in {self.source}; {advice}")


@dataclass(frozen=True)
class Identity:
    """Who we are, with the proof."""

    name: str
    key_pem: bytes = field(repr=False)  # stays out of every log
    certificate_pem: bytes

    @classmethod
    def load(cls, name: str, key_path: str | Path, federation: Federation) -> Identity:
        """Read a key file and check that the others take it for ``name``. Raises IdentityError; warns if others can read it."""
        num_listed = len(federation.member(name).certificates)
        key_pem, certificate = _read_key_file(Path(key_path))
        der, source = certificate.public_bytes(serialization.Encoding.DER), federation.source
        if not federation.is_listed(name, der):
            for owner in (owner for owner in federation.members if federation.is_listed(owner, der)):
                advice = f"give {name}'s key file, or the name {owner}"
                raise IdentityError(f"wrong key for the name: {key_path} is the key of {owner}, not of {name}; {advice}")
            advice = "put its member file into the federation file, here and at the others"
            raise IdentityError(f"the certificate in {key_path} is not among the {num_listed} of {name} in {source}; {advice}")
        state, begin, end, now = _validity(certificate)
        if state == "not yet valid":
            raise IdentityError(f"the certificate in {key_path} is valid from {begin}, here it is {now}; set the clock")
        if state == "expired":
            raise IdentityError(f"the certificate in {key_path} expired at {end}, here it is {now}; {_NEW} {name}")
        if Path(key_path).stat().st_mode & 0o077:
            warnings.warn(f"others on this machine can read or change {key_path}; run: chmod 600 {key_path}", stacklevel=2)
        return cls(name, key_pem, _pem(certificate).encode())


class FederationFile:
    """A federation file that is taken up anew whenever it changes and what it then says can be used."""

    def __init__(self, path: str | Path) -> None:
        """Raises IdentityError when the file cannot be used now."""
        self._path = Path(path)
        self._stamp, self._current = self._look(), Federation.load(path)

    @property
    def current(self) -> Federation:
        """What the file says; after a change that cannot be used, what it said before, with one warning."""
        stamp = self._look()  # before reading: a change in between is seen the next time
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._current = Federation.load(self._path)
            except IdentityError as error:
                warnings.warn(f"the changed federation file is not used, the one before still is: {error}", stacklevel=2)
        return self._current

    def _look(self) -> tuple[int, int, int] | None:
        with suppress(OSError):
            status = self._path.stat()
            return status.st_mtime_ns, status.st_size, status.st_ino
        return None  # gone, perhaps for a moment


def new_identity(name: str, address: str | None, role: Role, folder: str | Path) -> tuple[Path, Path]:
    """Write ``NAME.key`` (mode 0600; stays here) and ``NAME.member.yaml`` (goes to the others) into ``folder``.

    ECDSA P-256, because gRPC for Python fails with Ed25519. Raises IdentityError; never overwrites a file.
    """
    subject = x509.Name.from_rfc4514_string(f"CN={_name(name, 'a new identity')}")
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC).replace(microsecond=0)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(minutes=CLOCK_SLACK_MINUTES))
    builder = builder.not_valid_after(now + timedelta(days=VALIDITY_DAYS))
    for extension, critical in _extensions(name):
        builder = builder.add_extension(extension, critical)
    pem = _pem(builder.sign(key, hashes.SHA256()))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private_pem = key.private_bytes(serialization.Encoding.PEM, *plain).decode()
    tree = {"name": name, "role": role, "address": address or "null", "certificates": [pem]}
    key_path, member_path = Path(folder, f"{name}.key"), Path(folder, f"{name}.member.yaml")
    _create(member_path, _entry(_member(tree, "a new identity")), 0o644)
    try:
        _create(key_path, private_pem + pem, 0o600)
    except BaseException:
        member_path.unlink()  # of a key that nobody has
        raise
    return key_path, member_path


def federation_text(paths: Sequence[str | Path]) -> str:
    """The federation file made of member files, or of an older federation file and new member files.

    Certificates of one name are all listed, so that an old and a new one overlap; a warning asks to make sure of them.
    Raises IdentityError when two files differ in role or address, and for whatever ``Federation.load`` refuses.
    """
    return Federation(_merged([(member, str(path)) for path in paths for member in _read_members(Path(path))[0]])).dump()


def fingerprint(pem: str) -> str:
    """SHA-256 of the certificate's DER: 16 groups of 4 hex digits, to be read out over the phone."""
    return _parse(pem).fingerprint(hashes.SHA256()).hex(":", 2)


def describe(path: str | Path) -> str:
    """What a key, member or federation file says, for people; nothing of a private key. Raises IdentityError."""
    if "PRIVATE KEY" in _read_text(Path(path)):
        certificate = _read_key_file(Path(path))[1]
        told = [(f"{_owner(certificate)} (a key file)", certificate)]
    else:
        members = _read_members(Path(path))[0]
        told = [(f"{m.name} ({m.role}, {m.address or 'only dials'})", _parse(pem)) for m in members for pem in m.certificates]
    lines = []
    for head, certificate in told:
        state, begin, end, _ = _validity(certificate)
        lines += [head, f"  {state}: from {begin} until {end}", f"  {fingerprint(_pem(certificate))}"]
    return "\n".join(lines)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise IdentityError(f"{path} has more than {MAX_FILE_BYTES:,} bytes: not a key, member or federation file")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not text at byte {error.start}"
        raise IdentityError(f"{path} cannot be read ({reason}); give the path of a text file that you may read") from error


def _create(path: Path, text: str, mode: int) -> None:
    """A file that did not exist, with its mode from the first byte on; not left behind half."""
    created = False
    try:
        with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            created = True
            file.write(text)
    except FileExistsError:
        raise IdentityError(f"{path} exists and is never overwritten; to renew an identity, give another --folder") from None
    except OSError as error:
        if created:
            path.unlink()
        raise IdentityError(f"{path} cannot be written ({error.strerror}); choose a folder where you may write") from error


def _extensions(name: str) -> list[tuple[x509.ExtensionType, bool]]:
    """What every certificate must say, and whether critically: without the first two it could sign in another's name."""
    only_sign = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # digital_signature comes first
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    san, constraints = x509.SubjectAlternativeName([x509.DNSName(name)]), x509.BasicConstraints(ca=False, path_length=None)
    return [(only_sign, True), (constraints, True), (x509.ExtendedKeyUsage(purposes), False), (san, False)]


def _parse(pem: str) -> x509.Certificate:
    """The one certificate in a text; ValueError when there is none or another one hides behind it."""
    [certificate] = x509.load_pem_x509_certificates(pem.encode())
    return certificate


def _owner(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _checked(pem: Any, name: str, where: str) -> str:
    """A certificate as PEM again (and nothing else that stood around it), when it is one that `new_identity` makes."""
    try:
        certificate = _parse(pem)
        owner = _owner(certificate)
        certificate.verify_directly_issued_by(certificate)
        found = [certificate.extensions.get_extension_for_class(type(value)) for value, _ in _extensions(owner)]
        fits = [(extension.value, extension.critical) for extension in found] == _extensions(owner)
        fits = fits and certificate.subject == x509.Name.from_rfc4514_string(f"CN={owner}")
        fits = fits and isinstance(getattr(certificate.public_key(), "curve", None), ec.SECP256R1)
    except Exception as error:  # a stranger's bytes; cryptography has a dozen exceptions for them without a common root
        raise IdentityError(f"{where}: not exactly one certificate in PEM that can be read; {_NEW}") from error
    if not fits:
        raise IdentityError(f"{where}: the certificate is not of the form that cannot sign in another's name; {_NEW}")
    if owner != name:
        raise IdentityError(f"{where}: the certificate was made for {owner}, not for {name}; each member needs one of its own")
    return _pem(certificate)


def _read_key_file(path: Path) -> tuple[bytes, x509.Certificate]:
    """The file, which gRPC takes for the private key as it is, and the certificate in it; they belong together."""
    text = _read_text(path)
    try:
        key, certificate = serialization.load_pem_private_key(text.encode(), None), _parse(text)
        owner, belongs = _owner(certificate), key.public_key() == certificate.public_key()
    except Exception as error:  # as above
        wanted = "a private key without a password and its certificate, both PEM"
        raise IdentityError(f"{path} is not a key file ({wanted}); {_NEW}") from error
    if not belongs:
        raise IdentityError(f"the key in {path} does not belong to the certificate of {owner} beside it; {_NEW} {owner}")
    return text.encode(), certificate


def _validity(certificate: x509.Certificate) -> tuple[str, str, str, str]:
    moments = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    state = "not yet valid" if moments[2] < moments[0] else "expired" if moments[2] > moments[1] else "valid"
    begin, end, now = (f"{moment:%Y-%m-%d %H:%M} UTC" for moment in moments)
    return state, begin, end, now


def _entry(member: Member) -> str:
    """A member as YAML says it, in its own file and in the federation's; what is in it was checked to need no escapes."""
    head = f'name: "{member.name}"\nrole: {member.role}\naddress: {json.dumps(member.address)}\ncertificates:\n'
    return head + "".join("- |\n" + indent(pem, "  ") for pem in member.certificates)


def _read_members(path: Path) -> tuple[list[Member], bool]:
    """The members in a member or federation file, and whether it is the latter."""
    text = _read_text(path)
    if "PRIVATE KEY" in text:
        raise IdentityError(f"{path} holds a private key, which its owner gives to nobody; give NAME.member.yaml instead")
    try:
        tree = read_yaml(text, TextLoader)
    except ValueError as error:
        raise IdentityError(f"{path} is not YAML: {error}") from error
    if not tree:
        raise IdentityError(f"{path} is empty; if a command reads and writes it at once, let it write to another file")
    if not isinstance(tree, dict) or "members" not in tree:
        return [_member(tree, str(path))], False
    entries = tree["members"]
    if len(tree) > 1 or not isinstance(entries, list) or not entries:
        raise IdentityError(f"{path} is not a federation file: expected one key, members, and below it a list of members")
    return [_member(entry, f"{path}, member {number}") for number, entry in enumerate(entries, 1)], True


def _member(tree: Any, where: str) -> Member:
    if not isinstance(tree, dict) or set(tree) | {"address"} != {"name", "role", "address", "certificates"}:
        raise IdentityError(f"{where}: expected the keys name, role, address, certificates; got {_came(tree)}")
    name = _name(tree["name"], where)
    where = f"{where} ({name})"
    role, listed = tree["role"], tree["certificates"]
    if role not in get_args(Role):
        raise IdentityError(f"{where}: role is {_came(role)}, expected one of {', '.join(get_args(Role))}")
    if not isinstance(listed, list) or not listed:
        raise IdentityError(f"{where}: certificates is {_came(listed)}, expected a list of one or more")
    certificates = tuple(dict.fromkeys(_checked(pem, name, where) for pem in listed))
    return Member(name, role, _address(tree.get("address", "null"), where), certificates)


def _came(value: Any) -> str:
    """What came instead, in few words; values in a block are not printed: aliases make them as large as they like."""
    keys = f"the keys {', '.join(map(repr, value))}"[:200] if isinstance(value, dict) else None
    return keys or ("a list" if isinstance(value, list) else repr(value)[:80])


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.match(name) or name.replace(".", "").isdigit() and "." in name:
        rule = "1 to 63 of A-Z a-z 0-9 - _ and single dots, a letter or digit first and last, not an IP address"
        raise IdentityError(f"{where}: name is {_came(name)}; a name is {rule}")
    return name


def _address(address: Any, where: str) -> str | None:
    """HOST:PORT as written; None for null and for nothing."""
    if address in ("null", "~", ""):
        return None
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    fits = bool(re.fullmatch(r"[1-9][0-9]{0,4}", port)) and int(port) < 1 << 16
    try:  # digits and dots are an IPv4 address or a mistake; what stands in brackets is an IPv6 address
        number = (
            ipaddress.ip_address(host.strip("[]")) if re.fullmatch(r"[0-9.]+|\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]", host) else None
        )
    except ValueError:
        fits = False
    if not fits or not (number or _HOST.match(host)) or (number and number.is_unspecified):  # 0.0.0.0 is to listen on
        example = "the HOST:PORT that others dial, such as a.example.org:7000, 10.0.0.1:7000 or [2001:db8::1]:7000"
        raise IdentityError(f"{where}: address is {_came(address)}, expected {example}, or null if they cannot")
    return str(address)


def _merged(found: list[tuple[Member, str]]) -> dict[str, Member]:
    members: dict[str, Member] = {}
    sources: dict[str, str] = {}
    for member, source in found:
        name, before = member.name, members.setdefault(member.name, member)
        if before is not member and sources[name] == source:
            raise IdentityError(f"{source} has {name} twice; give it once, with all its certificates")
        sources.setdefault(name, source)
        one, other = (f"{m.role} at {m.address or 'no address'}" for m in (before, member))
        if one != other:
            raise IdentityError(f"{name} is {one} in {sources[name]} but {other} in {source}; edit one so that they agree")
        both = tuple(dict.fromkeys(before.certificates + member.certificates))
        if both != before.certificates:
            asks = f"ask {name} whether both fingerprints are right (dlora identity show)"
            warnings.warn(f"{name} has certificates from {sources[name]} and from {source}; {asks}", stacklevel=3)
        members[name] = replace(before, certificates=both)
    return members
