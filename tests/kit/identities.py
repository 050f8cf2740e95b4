"""Members that the tests of identity know, and what is said to a mistake."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlora.errors import IdentityError
from dlora.identity import certificates
from dlora.identity.keys import new_identity

ADDRESSES = {
    "anna": "anna.example.org:7000",
    "bob": None,
    "carol": "[2001:db8::1]:7000",
    "dave": None,
}


def write(path: str, text: str) -> str:
    Path(path).write_text(text)
    Path(path).chmod(0o600)
    return path


def refusal(action: Any, *says: str) -> None:
    with pytest.raises(IdentityError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in says if part not in message] == [], message


def certificate_of(member: str) -> str:
    [pem] = yaml.safe_load(member)["certificates"]
    assert isinstance(pem, str)
    return pem


def at(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """From now on the clock of this machine is that many days ahead (behind, when negative)."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=days)

    monkeypatch.setattr(certificates, "datetime", Shifted)


def entry(
    name: Any = "anna", role: Any = "peer", address: Any = None, certificates: Any = ()
) -> dict[str, Any]:
    return {"name": name, "role": role, "address": address, "certificates": list(certificates)}


# --- rotation
# --------------------------------------------------------------------------------------------------


def renew(folder: str = "new", address: str | None = ADDRESSES["anna"]) -> str:
    Path(folder).mkdir()
    return str(new_identity("anna", address, "peer", folder)[1])
