"""`dlora local`: processes with identities of their own, their output, and how they end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from dlora.errors import ConfigError, Interrupted
from dlora.programs.local import local
from kit.call_cli import call, start

TELLS = """
import os, pathlib, sys
for key in ("NAME", "INDEX", "COUNT"):
    print(key, os.environ["DLORA_" + key])
print("arguments", sys.argv[1:])
assert pathlib.Path(os.environ["DLORA_KEY"]).exists()
sys.stdout.write("10 %\\r50 %\\r100 %\\n")
"""
FAILS = """
import os, time
if os.environ["DLORA_INDEX"] == "1":
    raise SystemExit(7)
print("waits", flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "train.py"


def test_each_process_is_a_member_and_its_lines_say_whose_they_are(
    tmp_path: Path, script: Path
) -> None:
    script.write_text(TELLS)
    folder = tmp_path / "sites"
    outcome = call(
        "local",
        *("--peers", "3", "--rounds", "5", "--topology", "base-k", "--set", "wire=bfloat16"),
        *("--folder", str(folder), str(script), "--", "--epochs", "1"),
    )
    assert outcome.exit_code == 0, outcome.err
    for index in range(3):
        for line in (f"NAME peer-{index}", f"INDEX {index}", "COUNT 3", "100 %"):
            assert f"peer-{index} | {line}\n" in outcome.out
        assert f"peer-{index} | arguments ['--epochs', '1']\n" in outcome.out
    assert "10 %" not in outcome.out, "of a progress bar only the last state"
    section = yaml.safe_load((folder / "peers.yaml").read_text())
    assert (section["rounds"], section["topology"]["kind"]) == (5, "base-k")
    assert section["wire"] == "bfloat16" and section["members"] == ["peer-0", "peer-1", "peer-2"]
    federation = yaml.safe_load((folder / "federation.yaml").read_text())
    addresses = {member["address"] for member in federation["members"]}
    assert len(addresses) == 3 and all(one.startswith("127.0.0.1:") for one in addresses)
    again = call("local", "--folder", str(folder), str(script))
    assert again.exit_code == 2 and "is not empty; name a new folder" in again.err


def test_when_one_fails_the_others_are_stopped_and_the_table_says_so(script: Path) -> None:
    script.write_text(FAILS)
    began_at = time.monotonic()
    outcome = call("local", "--peers", "3", "--json", str(script))
    assert outcome.exit_code == 7 and time.monotonic() - began_at < 30
    told = json.loads(outcome.out)["peers"]
    assert [one["exit_code"] for one in told.values()] == [-15, 7, -15]
    assert "peer-1 failed with exit code 7; the others are stopped" in outcome.err


def test_a_stop_ends_all_processes_also_those_that_ignore_it(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text(STUBBORN)
    monkeypatch.setattr("dlora.programs.local.TERM_S", 1.0)
    said: list[str] = []
    with pytest.raises(Interrupted, match="all peers were ended"):
        local(str(script), peers=2, say=said.append, stop=lambda: len(said) == 2)
    assert sorted(said) == ["peer-0 | ready", "peer-1 | ready"]


def test_ctrl_c_ends_all_processes(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script.write_text(FAILS.replace('"1"', '"9"'))
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        local(str(script), peers=2)
    assert capfd.readouterr().out.count("waits") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_leaves_no_process(
    script: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C, and what a scheduler sends."""
    script.write_text(FAILS.replace('"1"', '"9"').replace("waits", "waits {os.getpid()}"))
    script.write_text(script.read_text().replace('print("', 'print(f"'))
    command = start(tmp_path, "local", "--peers", "2", str(script))
    assert command.stdout is not None
    lines = [command.stdout.readline() for _ in range(2)]
    command.send_signal(number)
    _, err = command.communicate(timeout=30)
    assert command.returncode == 4 and "all peers were ended" in err
    for line in lines:
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[-1]), 0)


def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.py is no file"):
        local(str(tmp_path / "nothing.py"))
    with pytest.raises(ConfigError, match="no-such-program cannot be started"):
        local("no-such-program", peers=2)
    with pytest.raises(ConfigError, match=r"topology\.kind"):
        local("true", overrides=["topology.kind=star"])
