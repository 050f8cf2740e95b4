"""Members with certificates that begin or end at any time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dlora.identity import certificates
from dlora.identity.keys import new_identity


@contextlib.contextmanager
def clock_ahead(**by: float) -> Iterator[None]:
    """The clock with which certificates are made and judged is ahead; behind, where negative. TLS
    has its own.
    """

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(**by)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "datetime", Shifted)
        yield


def made(name: str, folder: Path, left_s: float) -> None:
    """The files of a member whose certificate ends in ``left_s``."""
    with clock_ahead(days=-certificates.VALIDITY_DAYS, seconds=left_s):
        new_identity(name, "127.0.0.1:7000", "peer", folder)


def one_line(text: str) -> str:
    assert text.count("\n") == 1 and text.endswith("\n"), text
    return text
