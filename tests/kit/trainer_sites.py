"""transformers' Trainer at several sites: the same model, an order of rows that is given."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.data.formats import Example
from dlora.run.prepare import prepare
from kit.updates import peft_oracle


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
        eval_dataset=list(rows[:4]),
        data_collator=joined,
        callbacks=list(callbacks),
    )


class Dies(transformers.TrainerCallback):  # type: ignore[misc]
    """Kills its process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Hears(transformers.TrainerCallback):  # type: ignore[misc]
    """Reports logs, as TensorBoard's callback does."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: a kill may come while one is written."""
    whole = [
        (int(path.name.rpartition("-")[2]), str(path))
        for path in folder.glob("checkpoint-*")
        if (path / "trainer_state.json").exists()
    ]
    return max(whole)[1] if whole else None


def train_site(
    config: Config, place: int, files: dict[str, Any], folder: Path, dies_at: int, steps: int
) -> None:
    """What a site's process does: train from its last checkpoint on, mixing every two steps."""
    sys.stdout = sys.stderr = open(folder.with_suffix(f".{os.getpid()}.out"), "w")  # noqa: SIM115
    prepared = prepare(config)
    model, _ = peft_oracle(config)
    trainer = make_trainer(
        model,
        [*prepared.data.peers[prepared.names[place]]][:32],
        folder,
        [Dies(dies_at)],
        max_steps=steps,
        learning_rate=5e-3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=3,
        restore_callback_states_from_checkpoint=steps == 8,  # the trainer makes the callback anew
    )
    trainer.add_callback(dlora.PeerCallback(every_steps=2, **files))
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
