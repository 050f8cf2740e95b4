"""Random faults with one lying member among them: whatever happens, ledgers agree, means are kept
and the run ends.

`tests/kit/histories.py` says what a history is and what must hold; run it for an hour to look for
more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from kit.drawn_histories import HISTORIES, History
from kit.histories import try_history

pytestmark = pytest.mark.usefixtures("disk_of_a_virtual_world")

SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=8, suppress_health_check=SUPPRESSED)
@given(HISTORIES)
def test_every_history_ends_well(tmp_path: Path, history: History) -> None:
    try_history(history, tmp_path)


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=SUPPRESSED)
@given(HISTORIES)
def test_more_histories_end_well(tmp_path: Path, history: History) -> None:
    try_history(history, tmp_path)
