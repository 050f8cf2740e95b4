"""The example of three devices that agree past their cloud runs as it is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from kit.run_example import needs_texts, run_example

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "phones-with-neighbours"
DEVICES = ("phone", "tablet", "laptop")


@pytest.mark.slow  # minutes on two busy cores, most of it starts of Python with torch
@pytest.mark.timeout(900)
@needs_texts
def test_three_devices_end_with_one_adapter_and_the_bytes_planned(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = ["train.rounds=2", "train.local_steps=1", "data.eval_limit=40", "split.wire=float32"]
    out = run_example(EXAMPLE, folder, changes, 800)
    assert "the averaged adapter: the same file at all devices" in out
    simulated = json.loads((folder / "simulation" / "summary.json").read_text())["runs"]
    for name in DEVICES:
        assert (
            f" {name} " in out
            and f"{100 * simulated['local']['peers'][name]['accuracy']:.1f} %" in out
        )
        assert (folder / name / "report.html").exists()
        run = json.loads((folder / name / "summary.json").read_text())["runs"]["dec-lora"]
        assert run["consensus"]["loss"] == pytest.approx(
            simulated["dec-lora"]["consensus"]["loss"], rel=1e-5
        )
        assert run["edges"] == {
            other: {"mixed": 2, "left_out": 0, "in_doubt": 0} for other in DEVICES if other != name
        }
        planned = json.loads((folder / f"{name}.plan.json").read_text())
        between = sum(
            count for edge, count in planned["edges"].items() if name in edge.split(" - ")
        )
        assert run["cloud_bytes"] == pytest.approx(planned["cloud"]["cloud_bytes"], rel=0.02)
        assert run["bytes_on_wire"] == pytest.approx(between, rel=0.02)


def test_the_examples_configs_fit_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_DATA", "somewhere")
    config, cloud = (
        Config.load(EXAMPLE / "run.yaml"),
        CloudConfig.load(ROOT / "examples" / "phone-and-cloud" / "cloud.yaml"),
    )
    assert config.model == cloud.model and config.peers.members == DEVICES
    assert set(config.data.train) == set(DEVICES)
    assert config.data.max_length * config.per_device_eval_batch_size <= cloud.limits.max_tokens
