"""Four members with keys, three of them in one federation file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from kit.identities import ADDRESSES, write


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The text of the key file and of the member file of each member."""
    folder = tmp_path_factory.mktemp("made")
    files = {
        name: new_identity(name, address, "peer", folder) for name, address in ADDRESSES.items()
    }
    return {name: (key.read_text(), member.read_text()) for name, (key, member) in files.items()}


@pytest.fixture
def work(made: dict[str, tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds the files of anna, bob and carol, and the federation of the three;
    dave is a stranger.
    """
    monkeypatch.chdir(tmp_path)
    for name, (key, member) in made.items():
        write(f"{name}.key", key)
        Path(f"{name}.member.yaml").write_text(member)
    members = [f"{name}.member.yaml" for name in ("anna", "bob", "carol")]
    Path("federation.yaml").write_text(federation_text(members))
    return tmp_path
