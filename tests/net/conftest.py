"""A loop in a thread, and the networks that a channel goes over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dlora.net.loop_thread import LoopThread
from kit.channels import InMemory, Loopback


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    with LoopThread() as made:
        yield made


@pytest.fixture(params=[InMemory, Loopback], ids=["memory", "grpc"])
def net(request: pytest.FixtureRequest, tmp_path: Path, loop: LoopThread) -> InMemory | Loopback:
    made: InMemory | Loopback = request.param(tmp_path, loop)
    return made


@pytest.fixture
def grpc_net(tmp_path: Path, loop: LoopThread) -> Loopback:
    return Loopback(tmp_path, loop)


@pytest.fixture(autouse=True)
def quick_redial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlora.net.options.MAX_PAUSE_S", 0.05)
    monkeypatch.setattr("dlora.net.options.MIN_PAUSE_S", 0.01)
