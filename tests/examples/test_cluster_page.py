"""The commands of docs/cluster.md, with a tiny model, and its recipes as far as this machine can
read them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dlora.config.run import Config
from kit.page_blocks import blocks
from kit.processes import Federation, running

PAGE = "docs/cluster.md"


@pytest.mark.slow
def test_its_commands(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    config = make_config(**{"train.rounds": 1})
    (tmp_path / "run.yaml").write_text(config.dump())
    commands = [block.text for block in blocks(PAGE) if "-m dlora simulate" in block.first]
    assert len(commands) == 3
    for command in commands:
        out = typed(command, tmp_path)
        assert f"report: {config.output_dir}/report.html" in out
        assert out.count("dec-lora") == 2  # one table of scores and one of times
        shutil.rmtree(config.output_dir)


@pytest.mark.slow
def test_a_peer_of_two_processes(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    peers = Federation(tmp_path, model_folder("bert"), names=("north", "south"))
    [command] = [block.text for block in blocks(PAGE) if "-m dlora peer" in block.first]
    with running(peers):
        peers.start("south")
        out = typed(command, tmp_path)
        assert f"report: {peers.config.output_dir}/report.html" in out
        assert peers.finish("south").exit_code == 0
    assert peers.summary("south")["runs"]["dec-lora"]["consensus_peers"] == 2


def typed(command: str, folder: Path) -> str:
    """What a command of the page prints in ``folder``."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_job_is_a_service_and_a_job() -> None:
    [block] = [block for block in blocks(PAGE) if block.first.startswith("apiVersion")]
    service, job = yaml.safe_load_all(block.text)
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    [container] = job["spec"]["template"]["spec"]["containers"]
    shell, option, command = container["command"]
    assert (shell, option) == ("sh", "-c") and command.startswith("torchrun ")
    assert f"--nnodes={job['spec']['parallelism']} " in command and "\n" not in command
