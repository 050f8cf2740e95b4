"""The federation file: who is a member, with which role, address and certificates."""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import indent
from typing import Any, Literal, TypeAlias, get_args

from dlora.config.yaml_file import TextLoader, read_yaml
from dlora.errors import IdentityError
from dlora.identity.certificates import as_der, checked
from dlora.identity.files import read_text

Role: TypeAlias = Literal["peer", "cloud", "device"]
_NAME = re.compile(r"(?=.{1,63}\Z)[A-Za-z0-9]([A-Za-z0-9_-]|\.(?!\.))*(?<![._-])\Z", re.ASCII)
_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]|\.(?!\.))*\Z", re.ASCII)


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
        """Read and check a federation file. Raises IdentityError naming file, member, what came and
        what to do.
        """
        members, is_federation = read_members(Path(path))
        if not is_federation:
            raise IdentityError(
                f"{path} is the file of one member; make a federation file with: dlora identity"
                " federation"
            )
        return cls(_merged([(member, str(path)) for member in members]), str(path))

    def dump(self) -> str:
        """The YAML that ``load`` reads; the same members give the same bytes, in whatever order
        they came.
        """
        return "members:\n" + "".join(
            "- " + indent(entry_text(self.members[name]), "  ")[2:] for name in sorted(self.members)
        )

    def member(self, name: str) -> Member:
        """The member of that name. Raises IdentityError naming the nearest known one."""
        if name not in self.members:
            near = difflib.get_close_matches(name, self.members, n=1, cutoff=0.5)
            known = ", ".join(sorted(self.members)[:8]) + (", ..." if len(self.members) > 8 else "")
            advice = (
                f"did you mean {near[0]}?" if near else "take one of these, or add its member file"
            )
            raise IdentityError(
                f"{name} is not a member in {self.source}, which lists {known}; {advice}"
            )
        return self.members[name]

    def is_listed(self, name: str, der: bytes) -> bool:
        """Whether this certificate, in DER, is one of those listed for that name; False for an
        unknown name.
        """
        listed = self.members[name].certificates if name in self.members else ()
        return hashlib.sha256(der).digest() in [
            hashlib.sha256(as_der(pem)).digest() for pem in listed
        ]

    def trusted(self, names: Iterable[str]) -> bytes:
        """The certificates of these members, PEM after PEM: the roots of a TLS connection with any
        of them.
        """
        return "".join(pem for name in names for pem in self.member(name).certificates).encode()

    def check_dialable(self, edges: Iterable[tuple[str, str]]) -> None:
        """Raises IdentityError when neither end of an edge has an address, or an end is no
        member.
        """
        for one, other in edges:
            if [self.member(end).address for end in (one, other)] == [None, None]:
                advice = (
                    "give one of them an address: HOST:PORT there, or take a topology in which they"
                    " are no neighbours"
                )
                raise IdentityError(
                    f"{one} and {other} are neighbours but neither has an address in {self.source};"
                    f" {advice}"
                )

    def apart(self) -> list[str]:
        """Says which members can never meet, because nobody has an address that the others could
        dial.
        """
        said = []
        by_role: dict[Role, list[Member]] = {}
        for member in self.members.values():
            by_role.setdefault(member.role, []).append(member)
        again = "make one of them again with: dlora identity new NAME --address HOST:PORT"
        for role, own in by_role.items():
            names = ", ".join(sorted(member.name for member in own)[:8])
            if any(member.address for member in own):
                continue
            if role == "cloud" and "device" in by_role:
                said.append(
                    f"the cloud {names} has no address, so no path joins it and the devices;"
                    f" {again} --role cloud"
                )
            if (
                role == "peer"
                and len(own) > 1
                or role == "device"
                and len(own) > 1
                and "cloud" not in by_role
            ):
                said.append(
                    f"no path joins the {role}s {names}: none has an address that another could"
                    f" dial; {again}"
                )
        return said


def member_of_role(federation: Federation, name: str, role: Role) -> Member:
    """The member of that name. Raises IdentityError when it has another role."""
    member = federation.member(name)
    if member.role != role:
        known = (
            ", ".join(
                sorted(other.name for other in federation.members.values() if other.role == role)
            )
            or "none"
        )
        advice = f"name one of the members whose role is {role}: {known}"
        raise IdentityError(
            f"{name} is a {member.role} in {federation.source}, not a {role}; {advice}"
        )
    return member


class FederationFile:
    """A federation file that is read again whenever it changes; what it says counts once it can be
    used.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises IdentityError when the file cannot be used now."""
        self._path = Path(path)
        self._stamp, self._current = self._look(), Federation.load(path)

    @property
    def current(self) -> Federation:
        """What the file says; after a change that cannot be used, what it said before, with one
        warning.
        """
        stamp = self._look()  # before reading: a change in between is seen the next time
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._current = Federation.load(self._path)
            except IdentityError as error:
                warnings.warn(
                    f"the changed federation file is not used, the one before still is: {error}",
                    stacklevel=2,
                )
        return self._current

    def _look(self) -> tuple[int, int, int] | None:
        with suppress(OSError):
            status = self._path.stat()
            return status.st_mtime_ns, status.st_size, status.st_ino
        return None  # gone, perhaps for a moment


def federation_of(paths: Sequence[str | Path]) -> Federation:
    """The federation made of member files, or of an older federation file and new member files.

    Certificates of one name are all listed, so that an old and a new one overlap; a warning asks to
    make sure of them. Raises IdentityError when two files differ in role or address, and for
    whatever ``Federation.load`` refuses.
    """
    return Federation(
        _merged([(member, str(path)) for path in paths for member in read_members(Path(path))[0]])
    )


def federation_text(paths: Sequence[str | Path]) -> str:
    """The federation file that `federation_of` gives."""
    return federation_of(paths).dump()


def entry_text(member: Member) -> str:
    """A member as YAML says it, in its own file and in the federation's; what is in it was checked
    to need no escapes.
    """
    head = (
        f'name: "{member.name}"\nrole: {member.role}\naddress:'
        f" {json.dumps(member.address)}\ncertificates:\n"
    )
    return head + "".join("- |\n" + indent(pem, "  ") for pem in member.certificates)


def read_members(path: Path) -> tuple[list[Member], bool]:
    """The members in a member or federation file, and whether it is the latter."""
    text = read_text(path)
    if "PRIVATE KEY" in text:
        raise IdentityError(
            f"{path} holds a private key, which its owner gives to nobody; give NAME.member.yaml"
            " instead"
        )
    if text.lstrip().startswith("-----BEGIN "):
        advice = "its owner makes NAME.member.yaml with: dlora identity new NAME"
        raise IdentityError(
            f"{path} is a key or a certificate of another program, not a member or federation file;"
            f" {advice}"
        )
    try:
        tree = read_yaml(text, TextLoader)
    except ValueError as error:
        raise IdentityError(f"{path} is not YAML: {error}") from error
    if not tree:
        raise IdentityError(
            f"{path} is empty; if a command reads and writes it at once, let it write to another"
            " file"
        )
    if not isinstance(tree, dict) or "members" not in tree:
        return [checked_member(tree, str(path))], False
    entries = tree["members"]
    if len(tree) > 1 or not isinstance(entries, list) or not entries:
        raise IdentityError(
            f"{path} is not a federation file: expected one key, members, and below it a list of"
            " members"
        )
    return [
        checked_member(entry, f"{path}, member {number}") for number, entry in enumerate(entries, 1)
    ], True


def checked_member(tree: Any, where: str) -> Member:
    """The member that a parsed entry describes. Raises IdentityError, which begins with
    ``where``.
    """
    if not isinstance(tree, dict) or set(tree) | {"address"} != {
        "name",
        "role",
        "address",
        "certificates",
    }:
        raise IdentityError(
            f"{where}: expected the keys name, role, address, certificates; got {_came(tree)}"
        )
    name = checked_name(tree["name"], where)
    where = f"{where} ({name})"
    role, listed = tree["role"], tree["certificates"]
    if role not in get_args(Role):
        raise IdentityError(
            f"{where}: role is {_came(role)}, expected one of {', '.join(get_args(Role))}"
        )
    if not isinstance(listed, list) or not listed:
        raise IdentityError(
            f"{where}: certificates is {_came(listed)}, expected a list of one or more"
        )
    certificates = tuple(dict.fromkeys(checked(pem, name, where) for pem in listed))
    return Member(name, role, _address(tree.get("address", "null"), where), certificates)


def _came(value: Any) -> str:
    """What came instead, in few words. Values in a block are not printed: aliases can make them as
    large as they like.
    """
    keys = f"the keys {', '.join(map(repr, value))}"[:200] if isinstance(value, dict) else None
    return keys or ("a list" if isinstance(value, list) else repr(value)[:80])


def checked_name(name: Any, where: str) -> str:
    """``name``, if a member may have it. Raises IdentityError, which begins with ``where``."""
    if (
        not isinstance(name, str)
        or not _NAME.match(name)
        or name.replace(".", "").isdigit()
        and "." in name
    ):
        rule = (
            "1 to 63 of A-Z a-z 0-9 - _ and single dots, a letter or digit first and last, not an"
            " IP address"
        )
        raise IdentityError(f"{where}: name is {_came(name)}; a name is {rule}")
    return name


def _address(address: Any, where: str) -> str | None:
    """HOST:PORT as written; None for null and for nothing."""
    if address in ("null", "~", ""):
        return None
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    fits = bool(re.fullmatch(r"[1-9][0-9]{0,4}", port)) and int(port) < 1 << 16
    # digits and dots are an IPv4 address or a mistake; what stands in brackets is an IPv6 address
    try:
        number = (
            ipaddress.ip_address(host.strip("[]"))
            if re.fullmatch(r"[0-9.]+|\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]", host)
            else None
        )
    except ValueError:
        fits = False
    # 0.0.0.0 is to listen on
    if not fits or not (number or _HOST.match(host)) or (number and number.is_unspecified):
        example = (
            "the HOST:PORT that others dial, such as a.example.org:7000, 10.0.0.1:7000 or"
            " [2001:db8::1]:7000"
        )
        raise IdentityError(
            f"{where}: address is {_came(address)}, expected {example}, or null if they cannot"
        )
    return str(address)


def _merged(found: list[tuple[Member, str]]) -> dict[str, Member]:
    members: dict[str, Member] = {}
    sources: dict[str, str] = {}
    for member, source in found:
        name, before = member.name, members.setdefault(member.name, member)
        if before is not member and sources[name] == source:
            raise IdentityError(
                f"{source} has {name} twice; give it once, with all its certificates"
            )
        sources.setdefault(name, source)
        one, other = (f"{m.role} at {m.address or 'no address'}" for m in (before, member))
        if one != other:
            raise IdentityError(
                f"{name} is {one} in {sources[name]} but {other} in {source}; edit one so that they"
                " agree"
            )
        both = tuple(dict.fromkeys(before.certificates + member.certificates))
        if both != before.certificates:
            asks = f"ask {name} whether both fingerprints are right (dlora identity show)"
            warnings.warn(
                f"{name} has certificates from {sources[name]} and from {source}; {asks}",
                stacklevel=3,
            )
        members[name] = replace(before, certificates=both)
    return members
