"""Short runs of one participant with a schedule, and who was active in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlora.config.run import Config
from dlora.events.log import read_log

MakeConfig = Callable[..., Config]


def scheduled(make_config: MakeConfig, kind: str = "kr", /, **overrides: Any) -> Config:
    """One participant of twelve local steps in three rounds."""
    keys: dict[str, Any] = {
        "kind": kind,
        "period": 2,
        "warmup_steps": 5,
        "active_fraction": 0.3,
        "rewarm_steps": 2,
    }
    keys |= {
        key.removeprefix("schedule."): value
        for key, value in overrides.items()
        if key.startswith("schedule.")
    }
    others = {key: value for key, value in overrides.items() if not key.startswith("schedule.")}
    return make_config(
        **{"peers.count": 1, "train.local_steps": 4, "eval_every": 0, "schedule": keys, **others}
    )


def active_events(config: Config) -> list[dict[str, Any]]:
    return [
        event
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "active"
    ]
