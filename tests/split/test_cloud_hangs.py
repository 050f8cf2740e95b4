"""A cloud that hangs while its link lives: the device says so, is away for its neighbours, and
stops when it is told to.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dlora.config.cloud import CloudConfig
from dlora.net.channel import GIVE_UP_S
from dlora.programs.cloud import cloud
from dlora.run.cloud_of_a_peer import CloudOfAPeer
from dlora.run.frozen_model import CloudWord
from dlora.split.cloud.body import Body
from kit.processes import HUB, Split, running, until

PROMPT_S = 15.0  # for a process to end after it has been told to, on a machine with much to do


@pytest.mark.slow
def test_a_cloud_that_hangs_is_told_of_and_a_stop_is_answered(
    tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field case 33: its event loop lives and no part goes on; then it goes on, then it hangs for
    good and SIGTERM comes.
    """
    hangs, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
    goes_on.set()
    compute = Body.forward

    def forward(self: Body, *arguments: Any) -> Any:
        if hangs.is_set():
            goes_on.wait()
        return compute(self, *arguments)

    monkeypatch.setattr(Body, "forward", forward)
    changes = {"split.silence_s": 1.0, "train.rounds": 2000}
    with (
        running(Split(tmp_path, model_folder("bert"), changes=changes)) as split,
        ThreadPoolExecutor(1) as thread,
    ):
        key, federation = tmp_path / f"{HUB}.key", tmp_path / "federation.yaml"
        config = CloudConfig.load(tmp_path / "cloud.yaml")
        served = thread.submit(
            lambda: cloud(config, name=HUB, key=key, federation=federation, stop=ended.is_set)
        )
        try:
            split.start("phone")
            until(lambda: split.events("phone", "round"), "the first round")
            assert split.events("phone", "cloud-silent") == []

            goes_on.clear()
            hangs.set()
            until(
                lambda: split.events("phone", "cloud-silent"),
                "the device to say that the cloud is silent",
            )
            done = split.rounds_done("phone")
            hangs.clear()
            goes_on.set()
            until(lambda: split.rounds_done("phone") > done, "the device to go on")
            [silent], [back] = (
                split.events("phone", "cloud-silent"),
                split.events("phone", "cloud-back"),
            )
            assert (
                silent["reason"] == "the link lives, but no answer came for 1 s; it is waited for"
            )
            assert back["reason"] == "it answers again"

            goes_on.clear()
            hangs.set()
            until(
                lambda: len(split.events("phone", "cloud-silent")) == 2,
                "the device to say it again",
            )
            told_at = time.monotonic()
            split.signal("phone", signal.SIGTERM)
            outcome = split.finish("phone")
            assert time.monotonic() - told_at < GIVE_UP_S + PROMPT_S
            assert (
                outcome.exit_code == 4
                and "phone stopped while its cloud was away; what was saved stands" in outcome.err
            )
        finally:
            ended.set()
            hangs.clear()
            goes_on.set()
            served.result()


def test_a_device_whose_cloud_hangs_is_away_for_its_neighbours() -> None:
    """Field case 33: as where the link is lost, which `tests/run/test_both.py` shows with real
    neighbours.
    """
    said: list[str] = []
    log: Any = SimpleNamespace(
        emit=lambda event: said.append(event["event"]), tick=lambda event: None
    )
    cloud = CloudOfAPeer(log, "hub")
    away = []
    words: list[CloudWord] = [
        "cloud-silent",
        "cloud-back",
        "cloud-lost",
        "connection-refused",
        "cloud-back",
    ]
    for event in words:
        cloud.hear(event, "a reason")
        away.append(cloud.is_away)
    assert away == [True, False, True, True, False]
    assert said == words
