"""The loss that a run printed, and that of its adapter as PEFT loads it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.run.prepare import prepare


def printed_and_loaded(config: Config) -> tuple[float, float]:
    """The loss that a run prints of its average, and that of PEFT, which loads its folder on a
    fresh model.
    """
    summary = dlora.simulate(config)
    prepared = prepare(config.model_copy(update={"output_dir": config.output_dir + "-again"}))
    classification = config.task == "classification"
    factory: Any = (
        transformers.AutoModelForSequenceClassification
        if classification
        else transformers.AutoModelForCausalLM
    )
    with torch.random.fork_rng():
        torch.manual_seed(99)  # other new weights than dlora drew
        base = factory.from_pretrained(
            config.model, **({"num_labels": 2, "pad_token_id": 0} if classification else {})
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of transformers 6
        model = peft.PeftModel.from_pretrained(base, Path(config.output_dir, "consensus")).eval()
    batch = collate(prepared.data.evaluation, 0)
    with torch.no_grad():
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
    return summary["runs"]["dec-lora"]["consensus"]["loss"], loss.item()
