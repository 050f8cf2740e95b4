"""Every shipped config is one the program takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted([*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("benchmarks/*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DLORA_ASSETS", "DEMO_DATA", "SHAKESPEARE"):
        monkeypatch.setenv(name, "somewhere")
    kind = CloudConfig if path.name == "cloud.yaml" else Config
    assert kind.load(path).model
