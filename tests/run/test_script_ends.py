"""How a script with `dlora.Peer` ends when it should not: an error of its own, a NaN, Ctrl-C."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dlora.errors import RunError
from dlora.programs.local import local
from kit.script_peers import Sites

NAMES = ("east", "north")


def test_a_script_that_raises_leaves_its_state_folder_free(tmp_path: Path) -> None:
    sites = Sites(tmp_path, NAMES[:2], rounds=2, silence_s=2)

    def script(name: str) -> int:
        value, rounds = nn.Parameter(torch.ones(2)), 0
        for attempt in range(2 if name == "east" else 1):
            peer, start = sites.peer(name), copy.deepcopy(value)
            try:
                with peer.joined({"value": start}):
                    while peer.has_rounds_left:
                        if name == "east" and attempt == 0 and rounds == 1:
                            raise KeyError("a mistake of the script")
                        peer.mix()
                        rounds += 1
                    peer.average()
            except KeyError:
                continue
        return rounds

    # the second attempt of east goes on from its first values, as no checkpoint was made
    assert sites.run(script) == {"east": 3, "north": 2}


def test_a_site_that_starts_once_more_after_the_end_gets_the_same_average(tmp_path: Path) -> None:
    """Also if its script trains on after the last round, and if nobody else is there."""
    sites = Sites(tmp_path, NAMES, rounds=2, silence_s=2)

    def script(name: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        value = nn.Parameter(torch.ones(3))
        with (peer := sites.peer(name)).joined({"value": value}):
            while peer.has_rounds_left:
                with torch.no_grad():
                    value.add_(1.0 + NAMES.index(name))
                peer.mix()
            state = peer.state_dict()
            return peer.average()["value"], value.detach().clone(), state

    ended = sites.run(script)
    for name, (average, value, state) in ended.items():
        again = nn.Parameter(value + 1)
        (peer := sites.peer(name)).load_state_dict(state)
        with pytest.warns(UserWarning, match="begins without"), peer.joined({"value": again}):
            assert not peer.has_rounds_left
            assert torch.equal(peer.average()["value"], average)
    assert torch.equal(ended["east"][0], ended["north"][0])


def test_a_number_that_is_not_finite_is_not_sent(tmp_path: Path) -> None:
    sites = Sites(tmp_path, NAMES[:1], rounds=2)
    value = nn.Parameter(torch.ones(3))
    with (peer := sites.peer("east")).joined({"value": value}):
        with torch.no_grad():
            value[1] = float("nan")
        with pytest.raises(RunError, match="sends nothing in round 0: value is not finite"):
            peer.mix()
    assert not [*(tmp_path / "state" / "east" / "sent").iterdir()]


def test_a_number_that_is_too_large_for_the_wire_is_not_sent(tmp_path: Path) -> None:
    sites = Sites(tmp_path, NAMES[:1], rounds=1, wire="bfloat16")
    value = nn.Parameter(torch.ones(3))
    with (peer := sites.peer("east")).joined({"value": value}):
        with torch.no_grad():
            value[1] = 3.4e38  # rounded to bfloat16 it is infinite
        with pytest.raises(
            RunError, match="cannot be sent in round 0: value holds a value that is"
        ):
            peer.mix()
    assert not [*(tmp_path / "state" / "east" / "sent").iterdir()]


def test_a_long_wait_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlora.run.script_peer.TOLD_S", 0.1)
    sites, told = Sites(tmp_path, NAMES, rounds=1), threading.Event()

    def script(name: str) -> None:
        with (peer := sites.peer(name)).joined({"value": nn.Parameter(torch.ones(2))}):
            if name == "north":
                assert told.wait(60)
                peer.mix()
            else:
                with pytest.warns(UserWarning, match="east waits in round 0 for north"):
                    threading.Timer(1.5, told.set).start()
                    peer.mix()
            peer.average()

    sites.run(script)


INTERRUPTED = """
import os, pathlib, signal, threading, time
import torch
import dlora
from dlora.run.lock import check_unused

if os.environ["DLORA_INDEX"] == "1":  # a neighbour that never joins
    while not pathlib.Path("interrupted").exists():
        time.sleep(0.1)
    raise SystemExit
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    with dlora.Peer().joined({"value": torch.nn.Parameter(torch.ones(2))}):
        raise AssertionError("nobody was there")
except KeyboardInterrupt:
    check_unused(pathlib.Path(os.environ["DLORA_PEERS"]).parent / "state" / "peer-0")
    pathlib.Path("interrupted").touch()
"""


@pytest.mark.slow
def test_ctrl_c_while_it_waits_ends_a_script_and_frees_its_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(INTERRUPTED)
    said: list[str] = []
    told = local("train.py", peers=2, say=said.append)
    assert {one["exit_code"] for one in told["peers"].values()} == {0}, said
    assert (tmp_path / "interrupted").exists()
