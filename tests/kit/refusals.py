"""A mistake as a command answers it: exit code 2, one line, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kit.call_cli import Outcome, call, change, contents


def write(files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def set_keys(changes: dict[str, Any]) -> None:
    tree = yaml.safe_load(Path("run.yaml").read_text())
    change(tree, changes)
    Path("run.yaml").write_text(yaml.safe_dump(tree))


def assert_refuses(says: list[str], *arguments: str) -> None:
    before = contents(Path())
    assert_one_line(call(*arguments), says)
    assert contents(Path()) == before


def assert_one_line(outcome: Outcome, says: list[str]) -> None:
    assert outcome.exit_code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.endswith("\n") and outcome.err.count("\n") == 1, outcome.err
    assert [part for part in says if part not in outcome.err] == [], outcome.err
