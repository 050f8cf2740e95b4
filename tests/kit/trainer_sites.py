"""transformers' Trainer at several sites: the same model, an order of rows that is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from dlora.data.batches import collate
from dlora.data.formats import Example


class InOrder(transformers.Trainer):  # type: ignore[misc]
    """Takes the rows as they come."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def make_trainer(
    model: nn.Module,
    rows: Sequence[Example],
    output_dir: Path,
    callbacks: Sequence[transformers.TrainerCallback] = (),
    **arguments: Any,
) -> InOrder:
    """A trainer whose batches are the next rows, padded as dlora pads them."""

    def joined(batch: Sequence[Example]) -> dict[str, torch.Tensor]:
        made = collate(batch, 0)
        return {
            "input_ids": made.input_ids,
            "attention_mask": made.attention_mask,
            "labels": made.labels,
        }

    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return InOrder(
        model=model,
        args=transformers.TrainingArguments(**settings | arguments),
        train_dataset=list(rows),
        data_collator=joined,
        callbacks=list(callbacks),
    )


class Ends(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends the training with an error after a step, as a crash would."""

    def __init__(self, step: int, before: Callable[[], object] = lambda: None) -> None:
        self.step, self.before = step, before

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.before()
            raise RuntimeError("a crash")


class Hears(transformers.TrainerCallback):  # type: ignore[misc]
    """Reports logs, as TensorBoard's callback does."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))
