"""`dlora config`: what it prints loads as it is, and says every key, its default and its
meaning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlora.config.cloud import CloudConfig
from dlora.config.reading import paths_of
from dlora.config.run import Config
from kit.call_cli import call

KINDS = pytest.mark.parametrize(
    ("arguments", "document"), [([], Config), (["--cloud"], CloudConfig)]
)


def _uncommented(line: str) -> str:
    """A line of a block that is null by default, as YAML; comments stay."""
    return line if line.startswith("# ") and not line.startswith("#  ") else line.removeprefix("#")


def printed(*arguments: str) -> str:
    outcome = call("config", *arguments)
    assert (outcome.exit_code, outcome.err) == (0, "")
    return outcome.out


@KINDS
def test_what_is_printed_loads_and_is_the_defaults(
    arguments: list[str], document: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(printed(*arguments))
    loaded = document.load(path)
    plain = {"model": loaded.model}
    if document is Config:
        plain["data"] = {"train": loaded.data.train, "eval": loaded.data.eval}
    assert loaded == document.parse(plain)


@KINDS
def test_every_key_is_there_with_its_meaning(arguments: list[str], document: Any) -> None:
    lines = [_uncommented(line) for line in printed(*arguments).splitlines()]
    for path in paths_of(document):
        key = path.split(".")[-1]
        at = [number for number, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        meant = [number for number in at if lines[number - 1].strip().startswith("# ")]
        assert at and meant, f"{path} has no description in config.py"
    assert max(map(len, lines)) <= 110


def test_blocks_that_are_null_can_be_uncommented(tmp_path: Path) -> None:
    """The commented lines are YAML of the same keys."""
    lines = printed().splitlines()
    start = lines.index("#split:")
    end = next(
        number
        for number in range(start, len(lines))
        if _uncommented(lines[number]) == lines[number]
    )
    block = yaml.safe_load("\n".join(map(_uncommented, lines[start:end])))
    text = "\n".join(line for line in lines if not line.startswith(("#", "split:"))) + "\n"
    (tmp_path / "run.yaml").write_text(text + yaml.safe_dump(block))
    assert Config.load(tmp_path / "run.yaml").split is not None


@KINDS
def test_the_schema_is_that_of_the_keys(arguments: list[str], document: Any) -> None:
    schema = json.loads(printed("--schema", *arguments))
    assert set(schema["properties"]) == set(document.model_fields)
    assert schema["additionalProperties"] is False
    if document is Config:
        assert schema["$defs"]["LoraSection"]["properties"]["r"]["minimum"] == 1
