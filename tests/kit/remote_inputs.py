"""One model whole and with its body elsewhere, and inputs for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from dlora.split.cloud.body import Body
from dlora.split.device.half import Half, as_ordinary
from kit import queue_cloud
from kit.updates import LOSS_BOUND, UPDATE_BOUND, peft_oracle, relative_difference, targets

Folder = Callable[[str, str], Path]
Given = dict[str, Any]
LM, CLASSES = "causal-lm", "classification"


MADE: dict[Any, tuple[Half, Body, Any, Any]] = {}


def remote_and_whole(
    model_folder: Folder, family: str, task: str, pipeline: int = 1
) -> tuple[Any, Any]:
    """The model whose body is in a cloud, and PEFT's on the whole one; A as drawn, the same B that
    is not zero. Made once.
    """
    if (family, task) not in MADE:
        own = queue_cloud.config(
            model_folder(family, task), task, **{"lora.target_modules": targets(family)}
        )
        half = queue_cloud.device_half(own)
        remote, (whole, _) = as_ordinary(half), peft_oracle(own)
        generator, there = torch.Generator().manual_seed(0), dict(whole.named_parameters())
        with torch.no_grad():
            for name, parameter in remote.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.1, generator=generator)
                    there[f"base_model.model.{name}.default.weight"].copy_(parameter)
        MADE[family, task] = half, queue_cloud.cloud_body(Path(own.model)), remote, whole.eval()
    half, body, remote, whole = MADE[family, task]
    queue_cloud.link(half, queue_cloud.QueueCloud(body), pipeline)
    return remote, whole


def loss_looks(labels: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: the places whose logits foretell a target."""
    return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))


def assert_same(remote: Any, whole: Any, given: Given, where: Any = slice(None)) -> None:
    """The same logits, and of the loss, where there is one, the same gradients."""
    ours, theirs = remote(**given), whole(**{"use_cache": False} | given)
    assert type(ours) is type(theirs)
    if isinstance(ours, tuple):
        ours, theirs = (
            transformers.utils.ModelOutput(loss=tuple_[0], logits=tuple_[1])
            for tuple_ in (ours, theirs)
        )
    torch.testing.assert_close(ours.logits[where], theirs.logits[where], atol=1e-5, rtol=1e-5)
    if theirs.get("loss") is None:
        return
    assert abs(ours.loss.item() - theirs.loss.item()) < LOSS_BOUND
    found = []
    for model, output in ((remote, ours), (whole, theirs)):
        model.zero_grad()
        output.loss.backward()
        grown = {
            name: value.grad
            for name, value in model.named_parameters()
            if value.grad is not None and "lora_" in name
        }
        found.append(
            {
                name.removeprefix("base_model.model.").replace(".default.weight", ""): grad
                for name, grad in grown.items()
            }
        )
    assert found[0].keys() == found[1].keys()
    for part in ("lora_A", "lora_B"):
        assert relative_difference(found[0], found[1], part) < UPDATE_BOUND["adamw"], part


def plain(task: str) -> Given:
    rows = queue_cloud.batch(task)
    return {
        "input_ids": rows.input_ids,
        "attention_mask": rows.attention_mask,
        "labels": rows.labels,
    }


ROWS = queue_cloud.batch(LM)
