"""What `simulate` leaves in the run's folder, and that a dry run leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import dlora
from dlora.config.run import Config
from dlora.programs import simulate as program

MakeConfig = Callable[..., Config]


def test_a_run_leaves_the_folder_of_the_design(make_config: MakeConfig) -> None:
    config = make_config(**{"compare": ["pooled", "local", "fedavg"], "eval_every": 1})
    summary = dlora.simulate(config)
    run = Path(config.output_dir)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "manifest.json", "log.jsonl", "summary.json", "report.html", "consensus",
        "peers", "checkpoints",
    }  # fmt: skip
    assert json.loads((run / "summary.json").read_text()) == summary
    assert Config.load(run / "config.yaml") == config
    assert list(summary["runs"]) == ["dec-lora", "pooled", "local", "fedavg"]
    for name, result in summary["runs"].items():
        assert set(result["consensus"]) == {"accuracy", "f1", "loss"}
        assert list(result["peers"]) == (
            [] if name == "pooled" else [f"peer-{i}" for i in range(4)]
        )
        assert (result["bytes_on_wire"] > 0) == (name in ("dec-lora", "fedavg"))
        assert result["participant_steps_per_second"] > 0
    messages = 4 * 2 * config.train.rounds  # a ring of four: eight messages a round
    assert summary["runs"]["dec-lora"]["bytes_on_wire"] == messages * summary["message_bytes"]
    assert (
        summary["runs"]["fedavg"]["consensus_distance"]
        < 1e-9
        < summary["runs"]["local"]["consensus_distance"]
    )
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["labels"] == ["0", "1"]
    assert len(manifest["initial_factors"]) == len(manifest["model"]) == 64


def test_a_dry_run_writes_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    plan = program.dry_run(config)
    assert plan["local_steps"] == [2] * 4
    assert sum(peer["rows"] for peer in plan["peers"]) == 64
    assert not Path(config.output_dir).exists()
