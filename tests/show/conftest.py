"""Pages without pictures."""

from __future__ import annotations

import pytest


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn in them: for tests that read only the words around."""
    for kind in ("curves", "graph", "stacked_bars"):
        monkeypatch.setattr(
            f"dlora.show.report.pictures.{kind}",
            lambda *what, **how: '<svg viewBox="0 0 400 290" role="img"></svg>',
        )
