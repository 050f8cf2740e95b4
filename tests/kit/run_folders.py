"""What a finished run's folder holds: factors, optimiser, log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dlora.config.run import Config
from dlora.events.log import read_log


def factors_of(config: Config, run: str = "dec-lora") -> dict[str, torch.Tensor]:
    *_, folder = sorted(Path(config.output_dir, "checkpoints", run).glob("round-*"))
    return load_file(folder / "factors.safetensors")


def optimizer_of(config: Config, run: str = "dec-lora") -> dict[str, torch.Tensor]:
    *_, folder = sorted(Path(config.output_dir, "checkpoints", run).glob("round-*"))
    return load_file(folder / "optimizer.safetensors")


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def stop_after(rounds: int) -> Callable[[], bool]:
    """A user who presses Ctrl-C during round number ``rounds`` (counted from 1, over all runs)."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == rounds

    return stop


def story(config: Config) -> list[dict[str, Any]]:
    """The log without clocks and without the fact of having been resumed."""
    clocks = {"time", "seconds"}
    return [
        {key: value for key, value in event.items() if key not in clocks}
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] not in ("resumed", "run", "done")
    ]
