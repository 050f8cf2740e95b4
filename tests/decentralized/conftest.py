"""Tests of the protocol run twice: as `dlora peer` runs it, and as a script with `dlora.Peer`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.virtual_federation import World

# Whose tests are about faults of one peer and its neighbours. Both callers use the same gossip;
# what differs is how many rounds are between two checkpoints.
OF_THE_PROTOCOL = {
    "test_protocol",
    "test_protocol_transfers",
    "test_messages_on_disk",
    "test_misbehaviour",
    "test_liars",
    "test_older_copies",
    "test_words",
}
HERE = str(Path(__file__).parent)
ROUNDS_A_CHECKPOINT = {"peer": 1, "script": 3}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Add the second way to each test of the protocol; it runs in CI only."""
    if metafunc.module.__name__.rpartition(".")[2] in OF_THE_PROTOCOL:
        metafunc.fixturenames.append("caller")
        slow = pytest.param("script", marks=pytest.mark.slow)
        metafunc.parametrize("caller", ["peer", slow], indirect=True)


@pytest.fixture
def caller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who calls the gossip."""
    monkeypatch.setattr(World, "rounds_a_checkpoint", ROUNDS_A_CHECKPOINT[request.param])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The second way leaves out the long cases of a test, which the first way has."""
    twice = [item for item in items if len([*item.iter_markers("slow")]) > 1]
    long = [item for item in twice if "script" in item.name and item.fspath.dirname == HERE]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
