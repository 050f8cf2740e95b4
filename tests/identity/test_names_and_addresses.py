"""Which names, roles and addresses a member may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from dlora.errors import IdentityError
from dlora.identity import federation as federation_file
from dlora.identity.federation import Federation, federation_text
from dlora.identity.keys import Identity, new_identity
from kit.call_cli import contents
from kit.identities import refusal

# Names, roles, addresses

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
