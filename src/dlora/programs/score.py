"""Load the adapters of a finished run from their folders and score them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dlora.config.run import Config
from dlora.data.load import encode_evaluation
from dlora.errors import RunError
from dlora.evaluate import evaluate
from dlora.events.log import Listener
from dlora.lora.adapt import adapt
from dlora.lora.adapter_io import BEGUN_FROM, begin_from, load_adapter
from dlora.lora.core import DIRECTIONS_FILE, read_directions
from dlora.lora.stacked import StackedModel
from dlora.lora.taken_out import kept_taken_out
from dlora.model.load import load_model, load_tokenizer
from dlora.run.folder import read_config, resume_command
from dlora.tasks.generation import writing_of
from dlora.tasks.scores import Scores


def load_base(run: Path | str) -> tuple[Any, Any]:
    """The frozen model and the tokenizer of a run; ``PeftModel.from_pretrained(base,
    RUN/consensus)`` takes this model.

    It has the head with which the run began; the adapter folder brings the trained head. Raises
    UserError if ``run`` is no run.
    """
    config, labels = read_run(Path(run))
    tokenizer = load_tokenizer(config.model)
    return load_model(config, tokenizer, labels).network.eval(), tokenizer


def run_model(run: Path) -> tuple[Any, StackedModel]:
    """The tokenizer of a run, and its frozen model with adapters as the run attached them.

    Raises UserError if ``run`` is no run.
    """
    config, labels = read_run(run)
    tokenizer = load_tokenizer(config.model)
    directions = read_directions(run / DIRECTIONS_FILE) if config.lora.placement == "core" else None
    network = load_model(config, tokenizer, labels)
    model = adapt(network, config, directions, kept=kept_taken_out(run))
    if (run / BEGUN_FROM).is_dir():  # its head may have more than the trained tensors
        begin_from(run / BEGUN_FROM, model)
    return tokenizer, model


def score(
    run: Path | str, data: str | None = None, *, listeners: Sequence[Listener] = ()
) -> dict[str, Scores]:
    """Scores of ``RUN/consensus`` and every ``RUN/peers/<name>``, by name.

    They are taken on the run's evaluation data, limited as in the run, or on all rows of ``data``.
    Raises UserError if the folder is no finished run or ``data`` does not have the run's form.
    """
    run = Path(run)
    config, labels = read_run(run)
    if not (run / "consensus").is_dir():
        raise RunError(f"{run} has no adapters yet; finish it with: {resume_command(run)}")
    section = (
        config.data
        if data is None
        else config.data.model_copy(update={"eval": data, "eval_limit": None})
    )
    tokenizer, model = run_model(run)
    examples, choices = encode_evaluation(section, config.task, tokenizer, labels, config.seed)
    writing = writing_of(config.generation, examples, tokenizer)
    folders = {
        "consensus": run / "consensus",
        **{folder.name: folder for folder in sorted((run / "peers").glob("*"))},
    }

    def score_one(name: str) -> Scores:
        factors = load_adapter(folders[name], model)

        def tell(done: int, total: int) -> None:
            for listener in listeners:
                listener(
                    {
                        "event": "evaluating",
                        "run": str(run),
                        "what": name,
                        "done": done,
                        "total": total,
                    }
                )

        [scored] = evaluate(
            model,
            {key: tensor.to(model.device) for key, tensor in factors.items()},
            examples,
            choices,
            pad_token_id=tokenizer.pad_token_id,
            batch_size=config.per_device_eval_batch_size,
            autocast_dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
            on_batch=tell,
            writing=writing,
        )
        return scored.scores

    return {name: score_one(name) for name in folders}


def read_run(run: Path) -> tuple[Config, list[str] | None]:
    """The run's config, and the label names in order. Raises RunError if they cannot be read."""
    config = read_config(run)
    try:
        return config, json.loads((run / "manifest.json").read_text())["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"{run}: manifest.json cannot be read ({error}); restore it, or run again"
        ) from error
