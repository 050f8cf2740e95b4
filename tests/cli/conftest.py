"""A folder with a run: before it, and after."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.call_cli import call, furnish


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A folder with a config that works and its finished run; the tests damage copies."""
    folder = furnish(tmp_path_factory.mktemp("template") / "work", model_folder("bert"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome = call("simulate", "run.yaml")
    assert (outcome.exit_code, outcome.err) == (0, "")
    return folder


@pytest.fixture
def after_a_run(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a copy of the template, with the finished run in run/."""
    folder = shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def work(after_a_run: Path) -> Path:
    """The same before any run."""
    shutil.rmtree("run")
    return after_a_run
