"""The help, the version, and what is said before anything slow is loaded."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dlora
from kit.call_cli import Outcome, call
from kit.cli_text import words

REPOSITORY = Path(__file__).parents[2]
OPTIONS = {
    "simulate": ["CONFIG", "--set", "--resume", "--json", "--dry-run"],
    "peer": [
        "CONFIG",
        "--name",
        "--key",
        "--federation",
        "--listen",
        "--set",
        "--resume",
        "--json",
    ],
    "plan": ["CONFIG", "--name", "--set", "--json"],
    "eval": ["RUN", "--data", "--json"],
    "report": ["RUN"],
    "topology": ["KIND", "--peers", "--p", "--seed", "-k", "--weights", "--output", "--json"],
}


def test_help_names_the_commands_and_the_exit_codes() -> None:
    outcome = call("--help")
    assert (outcome.exit_code, outcome.err) == (0, "")
    text = words(outcome.out)
    assert [command for command in OPTIONS if f" {command} " not in text] == []
    codes = (
        "0 done, 2 your mistake (the message says how to fix it), 3 the other side's, 4 interrupted"
        " and resumable."
    )
    assert f"Exit codes: {codes}" in text


def test_without_a_command_there_is_the_help() -> None:
    outcome = call()
    assert outcome.exit_code == 2
    assert words(outcome.out) == words(call("--help").out)
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help_of_a_command_shows_its_options_and_an_example(command: str) -> None:
    outcome = call(command, "--help")
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert [option for option in OPTIONS[command] if option not in outcome.out] == []
    assert f"Example: dlora {command} " in words(outcome.out)
    assert call(command, "-h").out == outcome.out


def test_the_examples_in_the_help_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(
        r"Example: dlora (simulate (\S+) .*?) Options", words(call("simulate", "--help").out)
    )
    assert example is not None
    assert (REPOSITORY / example[2]).is_file()
    example = re.search(
        r"Example: dlora (topology .*?\.svg)", words(call("topology", "--help").out)
    )
    assert example is not None
    monkeypatch.chdir(tmp_path)
    assert call(*shlex.split(example[1])).exit_code == 0


def test_the_version() -> None:
    assert call("--version") == Outcome(0, f"dlora {dlora.__version__}\n", "")


def test_shell_completion_can_be_installed() -> None:
    assert "--install-completion" in call("--help").out


@pytest.mark.parametrize(
    "arguments", [["simulate"], ["plan"], ["eval"], ["peer", "run.yaml"], ["topology"]]
)
def test_what_is_missing_on_the_command_line_is_shown_by_an_example(arguments: list[str]) -> None:
    outcome = call(*arguments)
    assert outcome.exit_code == 2 and outcome.err.count("\n") == 1
    assert f"example: dlora {arguments[0]} " in outcome.err
    assert ("dlora config > run.yaml" in outcome.err) == ("CONFIG" in outcome.err)


@pytest.mark.parametrize("command", ["simulate", "peer", "device", "plan", "eval", "cloud"])
def test_the_first_line_comes_before_anything_slow_is_imported(
    command: str, tmp_path: Path
) -> None:
    """At that moment neither torch nor transformers is there; the line is no slower than Python and
    typer are.
    """
    needed = (
        []
        if command in ("simulate", "plan", "eval")
        else ["--name", "a", "--key", "a.key", "--federation", "f.yaml"]
    )
    code = f"""
import sys
from dlora import cli

class Watching:
    def __getattr__(self, name):
        return getattr(sys.__stderr__, name)

    def write(self, text):
        if text.strip():
            heavy = {{"torch", "transformers", "numpy"}} & sys.modules.keys()
            print(text.strip()[9:17], *sorted(heavy))
            sys.exit(0)

sys.stderr = Watching()
sys.argv = {["dlora", command, "run.yaml", *needed]!r}
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert (done.stdout, done.stderr) == ("starting\n", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "run.yaml"], "train.jsonl does not exist"),
        pytest.param(
            ["simulate", "run.yaml", "--dry-run"],
            "train.jsonl does not exist",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["peer", "run.yaml", "--name", "a", "--key", "k", "--federation", "f"],
            "peers.members is missing",
            marks=pytest.mark.slow,
        ),
        (
            [
                "peer",
                "run.yaml",
                "--name",
                "a",
                "--key",
                "k",
                "--federation",
                "f",
                "--set",
                "peers.members=[a,b]",
            ],
            "data.labels is missing",
        ),
        (
            ["device", "run.yaml", "--name", "a", "--key", "k", "--federation", "f"],
            "train.jsonl does not exist",
        ),
    ],
)
def test_what_the_config_tells_is_said_before_torch_is_loaded(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: none\ndata: {train: train.jsonl, eval: eval.jsonl}\n"
    )
    code = (
        "import sys\nfrom dlora import cli\ntry:\n    cli.main()\nfinally:\n    print('torch' in"
        " sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "False\n") and says in done.stderr
