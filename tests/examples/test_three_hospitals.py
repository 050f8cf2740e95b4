"""The example of three processes runs as it is shipped, and its tutorial speaks of commands that
exist.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from dlora.cli import app
from kit.run_example import needs_texts, run_example

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "three-hospitals"
TUTORIAL = ROOT / "docs" / "peers.md"
NAMES = ("north", "south", "west")


def blocks(language: str) -> list[str]:
    """The tutorial's code blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```",
        TUTORIAL.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )


def commands() -> list[list[str]]:
    """Every ``dlora ...`` that the tutorial shows, in words."""
    text = "\n".join([*blocks("console"), *blocks("sh"), *blocks("ini")]).replace("\\\n", " ")
    found = re.findall(r"(?:^\$ |^|exec |/)(dlora (?:[a-z]).*)$", text, re.MULTILINE)
    return [shlex.split(line.rstrip("'"), comments=True) for line in found]


@pytest.mark.slow  # 40 s on two half-busy cores, most of it four starts of Python with torch
@pytest.mark.timeout(600)
@needs_texts
def test_three_hospitals_end_with_one_consensus_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = [
        "train.rounds=2",
        "train.local_steps=1",
        "data.limit=40",
        "data.eval_limit=40",
        "peers.silence_s=120",
    ]
    out = run_example(EXAMPLE, folder, changes, 500)
    adapters = {
        (folder / name / "consensus" / "adapter_model.safetensors").read_bytes() for name in NAMES
    }
    assert len(adapters) == 1
    assert "consensus adapters: the same file everywhere, to the last byte" in out
    for name in NAMES:
        assert f" {name} " in out
        result = json.loads((folder / name / "summary.json").read_text())["runs"]["dec-lora"]
        assert result["consensus_peers"] == 3
        assert result["edges"] == {
            other: {"mixed": 2, "left_out": 0, "in_doubt": 0} for other in NAMES if other != name
        }


def test_the_tutorial_names_options_that_exist() -> None:
    group = typer.main.get_command(app)
    found = commands()
    assert len(found) >= 8
    for words in found:
        command, rest = group, words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]  # type: ignore[attr-defined]
        assert command is not group and not hasattr(command, "commands"), (
            f"no such command: {' '.join(words)}"
        )
        known = {option for parameter in command.params for option in parameter.opts}
        unknown = [word for word in rest if word.startswith("-") and word not in known]
        assert not unknown, f"{' '.join(words)}: {unknown} not among {sorted(known)}"


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
def test_the_service_file_is_one_that_systemd_takes(tmp_path: Path) -> None:
    [unit] = blocks("ini")
    path = tmp_path / "dlora.service"
    # What need not exist here: the program and its folders.
    path.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/sh", unit, flags=re.MULTILINE))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True
    )
    said = [line for line in verified.stderr.splitlines() if "dlora.service" in line]
    assert (verified.returncode, said) == (0, []), verified.stderr


def test_the_service_starts_a_new_run_and_resumes_one(tmp_path: Path) -> None:
    """The shell line of the service file, with a dlora that prints what it was given."""
    [line] = [
        line.removeprefix("ExecStart=")
        for line in blocks("ini")[0].replace("\\\n", " ").splitlines()
        if "ExecStart=" in line
    ]
    shell, flag, script = shlex.split(line)
    (tmp_path / "dlora").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "dlora").chmod(0o755)
    script = re.sub(r"exec \S*/dlora", f"exec {tmp_path}/dlora", script).replace("$$", "$")

    def started() -> list[str]:
        return subprocess.run(
            [shell, flag, script], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.split()

    first = started()
    assert first[0] == "peer" and "--resume" not in first
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert started() == [*first, "--resume"]
