"""Models that `dlora.connect` gives, and what they are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import dlora
from dlora.config.run import Config
from kit import queue_cloud
from kit.serving_cloud import Members

STEPS = 10
TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
}
TASKS = {"bert": "classification", "llama": "causal-lm"}


def config(folder: Path, family: str, **changes: Any) -> Config:
    labels = {"data.labels": ["no", "yes"]} if TASKS[family] == "classification" else {}
    return queue_cloud.config(
        folder,
        TASKS[family],
        **{"split.cloud": "hub", "lora.target_modules": TARGETS[family], **labels, **changes},
    )


def connect(members: Members, config: Config, name: str = "phone") -> Any:
    return dlora.connect(config, name=name, key=members.key(name), federation=members.federation)


@contextmanager
def connected(members: Members, config: Config, name: str = "phone") -> Iterator[Any]:
    model = connect(members, config, name)
    try:
        yield model
    finally:
        model.disconnect()


def batches(family: str, count: int = STEPS) -> list[dict[str, torch.Tensor]]:
    made = []
    for seed in range(count):
        batch = queue_cloud.batch(TASKS[family], lengths=(5, 9, 3, 7), seed=seed)
        made.append(
            {
                "input_ids": batch.input_ids,
                "attention_mask": batch.attention_mask,
                "labels": batch.labels,
            }
        )
    return made


def train(model: Any, family: str, accumulate: int = 1) -> list[float]:
    """Anybody's loop."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=5e-3), []
    for step, batch in enumerate(batches(family)):
        loss = model(**batch).loss / accumulate
        loss.backward()
        losses.append(loss.item())
        if (step + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return losses
