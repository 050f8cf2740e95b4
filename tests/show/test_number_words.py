"""Numbers as people read them."""

from __future__ import annotations

import pytest

from dlora.show.words import several_text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 peers"), (1, "1 peer"), (2, "2 peers"), (3000, "3,000 peers")]
)
def test_one_thing_is_no_several(count: int, text: str) -> None:
    assert several_text(count, "peer") == text
