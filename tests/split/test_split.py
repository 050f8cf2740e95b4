"""Law 6: split is unsplit. The conversation of both halves over plain queues, against the whole
model and against PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from dlora.data.batches import Batch
from dlora.errors import ConfigError
from kit import updates
from kit.queue_cloud import batch, config, device_half, factors, link, whole_model
from kit.split_steps import cloud_of, step_of
from kit.split_training import assert_same_step, assert_same_training, some_steps, train

UPDATE_BOUND, LOSS_BOUND = updates.UPDATE_BOUND, updates.LOSS_BOUND
Folder = Callable[[str, str], Path]
# name -> family, task, optimiser, pipeline, what of the config; every feature at least once
CASES: dict[str, tuple[str, str, str, int, dict[str, Any]]] = {
    "bert-pooled-adamw": ("bert", "classification", "adamw", 1, {}),
    "bert-mean-sgd": ("bert", "classification", "sgd", 3, {"pooling": "mean"}),
    "bert-pooler-sgd": (
        "bert",
        "classification",
        "sgd",
        2,
        {"lora.target_modules": ["query", "dense"]},
    ),
    "bert-patterns-adamw": ("bert", "classification", "adamw", 2, updates.KINDS["patterns"]),
    "bert-rslora-adamw": ("bert", "classification", "adamw", 1, updates.KINDS["rslora"]),
    "roberta-adamw": (
        "roberta",
        "classification",
        "adamw",
        2,
        {"train.gradient_accumulation_steps": 2},
    ),
    "llama-sgd": ("llama", "causal-lm", "sgd", 2, {}),
    "llama-classes-adamw": (
        "llama",
        "classification",
        "adamw",
        1,
        {"lora.target_modules": ["q_proj", "v_proj"]},
    ),
    "opt-adamw": ("opt", "causal-lm", "adamw", 3, {}),
    "gpt2-classes-sgd": ("gpt2", "classification", "sgd", 1, {"lora.train_head": False}),
    "gpt2-adamw": ("gpt2", "causal-lm", "adamw", 1, {}),
    "bert-regression": ("bert", "regression", "adamw", 1, {"pooling": "mean"}),
    "bert-words": ("bert", "token-classification", "adamw", 2, {}),
    "gpt2-labels": ("gpt2", "multi-label", "sgd", 2, {}),
}
QUICK = (
    "bert-pooled-adamw",
    "bert-patterns-adamw",
    "roberta-adamw",
    "llama-sgd",
    "opt-adamw",
    "gpt2-classes-sgd",
)


@pytest.mark.parametrize(
    "name",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_split_is_unsplit(model_folder: Folder, name: str) -> None:
    family, task, optimizer, pipeline, overrides = CASES[name]
    law_six(model_folder, family, task, optimizer, pipeline, 20, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), *updates.SERVED[1:]])
@pytest.mark.parametrize("pipeline", [1, 3])
def test_split_is_unsplit_for_long(
    model_folder: Folder, family: str, task: str, optimizer: str, pipeline: int
) -> None:
    law_six(
        model_folder,
        family,
        task,
        optimizer,
        pipeline,
        50,
        {"train.gradient_accumulation_steps": 2},
    )


def law_six(
    model_folder: Folder,
    family: str,
    task: str,
    optimizer: str,
    pipeline: int,
    count: int,
    overrides: dict[str, Any],
) -> None:
    own = config(model_folder(family, task), task, **overrides)
    half, cloud, whole = device_half(own), cloud_of(own), whole_model(own)
    assert half.model.initial.keys() == whole.initial.keys()
    # as PEFT draws them
    assert all(
        torch.equal(half.model.initial[name], value) for name, value in whole.initial.items()
    )
    link(half, cloud, pipeline)
    steps = some_steps(count, task, own.train.gradient_accumulation_steps)
    ours = train(half.model, factors(half.model), steps, optimizer)
    frozen = "nothing" if own.lora.train_head else "score"
    assert_same_training(ours, train(whole, factors(whole), steps, optimizer), optimizer, frozen)
    assert (
        cloud.channels[0].session.num_parts == 0
        and cloud.budget.free_bytes == cloud.budget.num_bytes
    )


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "classification"), pytest.param("llama", "causal-lm", marks=pytest.mark.slow)],
)
def test_split_is_plain_peft(model_folder: Folder, family: str, task: str) -> None:
    own = config(
        model_folder(family, task), task, **{"lora.target_modules": updates.targets(family)}
    )
    half = device_half(own)
    link(half, cloud_of(own), 2)
    steps = some_steps(20, task)
    values = {name: value[None].clone() for name, value in half.model.initial.items()}
    losses, update = train(half.model, values, steps, "adamw")

    oracle, initial = updates.peft_oracle(own)
    oracle.train()
    optimizer = torch.optim.AdamW(
        [p for p in oracle.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01
    )
    schedule = transformers.get_scheduler(
        "linear", optimizer, num_warmup_steps=5, num_training_steps=len(steps)
    )
    for step, [own_batch] in enumerate(steps):
        loss = oracle(
            input_ids=own_batch.input_ids,
            attention_mask=own_batch.attention_mask,
            labels=own_batch.labels,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in oracle.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert abs(losses[step].item() - loss.item()) < LOSS_BOUND
    final = peft.get_peft_model_state_dict(oracle)
    ours = {}
    for name in initial:
        short = name.removeprefix("base_model.model.")
        ours[name] = update[short.removesuffix(".weight") if "lora_" in short else short][0]
    updates.assert_same(
        ours, {name: final[name] - initial[name] for name in initial}, UPDATE_BOUND["adamw"], task
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_factors_that_rest_get_no_gradient(model_folder: Folder, family: str) -> None:
    """Rule ffa trains B alone."""
    own = config(model_folder(family, "classification"), pooling="mean")
    half, whole = device_half(own), whole_model(own)
    link(half, cloud_of(own), 2)
    ours, theirs = (
        train(model, factors(model), some_steps(5), "sgd", "lora_A")
        for model in (half.model, whole)
    )
    assert_same_training(ours, theirs, "sgd", "lora_A")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), updates.SERVED)
@pytest.mark.parametrize("pipeline", [1, 3])
def test_every_step_of_a_run_has_the_same_gradient(
    model_folder: Folder, family: str, task: str, pipeline: int
) -> None:
    """At the whole model's factors of each step: here rounding cannot grow from step to step, as it
    may in a long run.
    """
    own = config(model_folder(family, task), task)
    half, whole = device_half(own), whole_model(own)
    link(half, cloud_of(own), pipeline)
    values = factors(whole)
    for [given] in some_steps(50, task):
        found = []
        for model in (half.model, whole):
            copies = {
                name: value.detach().clone().requires_grad_() for name, value in values.items()
            }
            model.network.eval()  # GPT-2's own head dropout
            found.append(step_of(model, copies, given))
        (ours, own_gradients), (theirs, gradients) = found
        torch.testing.assert_close(ours, theirs, rtol=0, atol=LOSS_BOUND)
        for part in ("lora_A", "lora_B"):
            assert (
                updates.relative_difference(own_gradients, gradients, part) < UPDATE_BOUND["adamw"]
            ), part
        train(whole, values, [[given]], "adamw")


def left_padded(own: Batch) -> Batch:
    rows = [mask.bool() for mask in own.attention_mask]

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [torch.cat([row[~mask], row[mask]]) for row, mask in zip(tensor, rows, strict=True)]
        )

    kinds = own.labels.clone() if own.labels.dim() == 1 else shifted(own.labels)
    if kinds.dim() == 2:
        # else padding would foretell it
        kinds[torch.arange(len(rows)), [len(row) - int(row.sum()) for row in rows]] = -100
    return Batch(shifted(own.input_ids), shifted(own.attention_mask), kinds, None)


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "causal-lm"), ("opt", "causal-lm"), ("gpt2", "classification")]
)
def test_left_padding(model_folder: Folder, family: str, task: str) -> None:
    own = config(model_folder(family, task), task)
    half, whole, padded = device_half(own), whole_model(own), left_padded(batch(task))
    link(half, cloud_of(own), 2)
    assert_same_step(
        step_of(half.model, factors(half.model), padded), step_of(whole, factors(whole), padded)
    )


def test_left_padding_of_encoders(model_folder: Folder) -> None:
    """RoBERTa counts positions from the ids, which the cloud never sees; a head that reads a pad is
    refused.
    """
    own = config(model_folder("roberta", "classification"), pooling="mean")
    half, whole, padded = device_half(own), whole_model(own), left_padded(batch())
    link(half, cloud_of(own), 2)
    assert_same_step(
        step_of(half.model, factors(half.model), padded), step_of(whole, factors(whole), padded)
    )
    for family in ("bert", "roberta"):
        own = config(model_folder(family, "classification"))
        half = device_half(own)
        link(half, cloud_of(own))
        with pytest.raises(ConfigError, match="pad on the right"):
            step_of(half.model, factors(half.model), padded)


def test_positions_and_token_types_travel(model_folder: Folder) -> None:
    own, given = config(model_folder("bert", "classification")), batch()
    half, whole = device_half(own), whole_model(own)
    link(half, cloud_of(own), 2)
    generator = torch.Generator().manual_seed(5)
    shape = given.input_ids.shape
    more = {
        "position_ids": torch.randint(0, 30, shape, generator=generator),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
    }
    found = []
    for model, arguments in ((half.model, more), (whole, more), (whole, {})):
        model.use(factors(model))
        with torch.no_grad():
            found.append(
                model.network(
                    input_ids=given.input_ids, attention_mask=given.attention_mask, **arguments
                ).logits
            )
    torch.testing.assert_close(found[0], found[1])
    assert (found[1] - found[2]).abs().max() > 1e-3  # they matter


def test_labels_and_the_models_own_loss(model_folder: Folder) -> None:
    """As a Trainer calls it, `num_items_in_batch` included; a call without labels afterwards gives
    all logits.
    """
    own = config(model_folder("llama", "causal-lm"), "causal-lm")
    half, whole, given = device_half(own), whole_model(own), batch("causal-lm")
    link(half, cloud_of(own))
    found = []
    for model in (half.model, whole):
        model.use(factors(model))
        arguments = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
        loss = model.network(
            **arguments, labels=given.labels, num_items_in_batch=torch.tensor(7)
        ).loss
        with torch.no_grad():
            found.append(
                (loss.detach(), model.network(**arguments).logits[given.attention_mask.bool()])
            )
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
