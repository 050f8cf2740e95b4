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

PAGE = "docs/cluster.md"


@pytest.mark.slow
def test_its_commands(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    config = make_config(**{"train.rounds": 1})
    (tmp_path / "run.yaml").write_text(config.dump())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    commands = [block for block in blocks(PAGE) if block.first.startswith("torchrun")]
    assert len(commands) == 2
    for command in commands:
        done = subprocess.run(
            ["bash", "-ec", command.text],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert f"report: {config.output_dir}/report.html" in done.stdout
        assert done.stdout.count("dec-lora") == 2  # one table of scores and one of times
        shutil.rmtree(config.output_dir)


def test_the_job_is_a_service_and_a_job() -> None:
    [block] = [block for block in blocks(PAGE) if block.first.startswith("apiVersion")]
    service, job = yaml.safe_load_all(block.text)
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    [container] = job["spec"]["template"]["spec"]["containers"]
    shell, option, command = container["command"]
    assert (shell, option) == ("sh", "-c") and command.startswith("torchrun ")
    assert f"--nnodes={job['spec']['parallelism']} " in command and "\n" not in command
