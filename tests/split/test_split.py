"""Law 6: split is unsplit. The conversation of both halves over plain queues, against the whole
model and against PEFT.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.config.training import TrainSection
from dlora.data.batches import Batch
from dlora.errors import ConfigError, ModelError
from dlora.lora.factors import Factors
from dlora.lora.stacked import StackedModel
from dlora.lora.units import active_groups, find_groups
from dlora.model.load import load_tokenizer
from dlora.split.cloud.body import Body, load_body
from dlora.split.device.half import Half, as_ordinary, load_half
from dlora.train import Group, forward, learning_rate, local_steps
from dlora.wire.split.frames import Begin, SplitFrame, Values
from kit import updates
from kit.queue_cloud import (
    QueueCloud,
    batch,
    config,
    device_half,
    factors,
    labels,
    link,
    whole_model,
)
from kit.split_steps import cloud_of, loss_of, step_of

UPDATE_BOUND, LOSS_BOUND = updates.UPDATE_BOUND, updates.LOSS_BOUND
Folder = Callable[[str, str], Path]


def train(
    model: StackedModel,
    values: Factors,
    steps: list[list[Batch]],
    optimizer: str,
    frozen: str = "nothing",
) -> tuple[torch.Tensor, Factors]:
    """Losses, and what the steps changed; rates, warm-up and schedule are those of law 1."""
    rate = {"adamw": 5e-3, "sgd": 0.1}[optimizer]
    section = TrainSection(
        optimizer=optimizer,
        learning_rate=rate,
        weight_decay=0.01,
        lr_scheduler_type="linear",
        warmup_steps=5,
    )
    rates = [learning_rate(section, step, len(steps)) for step in range(len(steps))]
    group = Group(values, 0, 1, section)
    group.train_only(
        frozenset(
            name for name in values if not name.endswith(frozen) and name not in model.frozen_head
        )
    )
    before = {name: value.detach().clone() for name, value in values.items()}
    losses = local_steps(model, group, steps, rates, section)
    return losses, {name: group.parameters[name].detach() - before[name] for name in values}


def some_steps(
    count: int, task: str = "classification", micro_batches: int = 1, **arguments: Any
) -> list[list[Batch]]:
    return [
        [batch(task, seed=100 * step % 700 + micro, **arguments) for micro in range(micro_batches)]
        for step in range(count)
    ]


def assert_same_training(
    split: tuple[torch.Tensor, Factors],
    whole: tuple[torch.Tensor, Factors],
    optimizer: str,
    frozen: str = "nothing",
) -> None:
    assert (split[0] - whole[0]).abs().max() < LOSS_BOUND
    assert (whole[0][-1] - whole[0][0]).abs() > 1e-3  # it moved
    parts = [
        part
        for part in ("lora_A", "lora_B", "classifier", "score")
        if any(part in name for name in whole[1])
    ]
    for part in parts:
        if part == frozen:
            assert all(not split[1][name].any() for name in split[1] if part in name)
        else:
            assert (
                updates.relative_difference(split[1], whole[1], part) < UPDATE_BOUND[optimizer]
            ), part


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
}


QUICK = ("bert-pooled-adamw", "roberta-adamw", "llama-sgd", "opt-adamw", "gpt2-classes-sgd")


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


def assert_same_step(
    ours: tuple[torch.Tensor, Factors], theirs: tuple[torch.Tensor, Factors]
) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=2e-6, msg=name)


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


# What travels


def watched_step(
    half: Half, cloud: QueueCloud, given: Batch, pipeline: int = 1
) -> list[tuple[bool, SplitFrame]]:
    seen: list[tuple[bool, SplitFrame]] = []
    link(half, cloud, pipeline, seen=lambda up, frame: seen.append((up, frame)))
    step_of(half.model, factors(half.model), given)
    return [(up, frame) for up, frame in seen if isinstance(frame, Begin | Values)]


def test_groups_share_frames_and_nothing_goes_below_the_lowest(model_folder: Folder) -> None:
    own = config(model_folder("llama", "causal-lm"), "causal-lm")
    half, given = device_half(own), batch("causal-lm")
    names = [[name.rpartition(".")[2] for name in group.modules] for group in half.agreement.groups]
    assert names == 2 * [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    frames = watched_step(half, cloud_of(own), given)
    values = [(frame.what, frame.group) for _, frame in frames if isinstance(frame, Values)]
    assert Counter(values) == Counter(
        [(what, group) for what in ("input", "update", "update-gradient") for group in range(8)]
        # none of group 0: below it nothing trains
        + [("input-gradient", group) for group in range(1, 8)]
        + [("hidden", 0), ("hidden-gradient", 0)]
    )
    tokens = int(given.attention_mask.sum())
    for _, frame in frames:
        if isinstance(frame, Values) and not frame.what.startswith("hidden"):
            group = half.agreement.groups[frame.group]
            width = group.in_features if frame.what.startswith("input") else group.width
            assert tuple(frame.tensor.shape) == (tokens, width)


def test_only_active_modules_travel(model_folder: Folder) -> None:
    own = config(
        model_folder("bert", "classification"),
        **{"lora.target_modules": r".*layer\.1.*(query|value)"},
    )
    frames = watched_step(half := device_half(own), cloud_of(own), batch())
    assert [group.modules for group in half.agreement.groups] == [
        ("encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.value")
    ]
    assert [frame.what for up, frame in frames if isinstance(frame, Values)] == [
        "input", "update", "hidden", "hidden-gradient", "update-gradient",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "task", "rows"),
    [
        ("bert", "classification", 4),
        ("roberta", "classification", 4),
        ("llama", "classification", 4),
        ("llama", "causal-lm", 6),
    ],
)
def test_hidden_comes_only_where_the_loss_looks(
    model_folder: Folder, family: str, task: str, rows: int
) -> None:
    own = config(model_folder(family, task), task)
    given = batch(task)
    if task == "causal-lm":
        # of four texts the targets 1 and 2, which positions 0 and 1 foretell
        given.labels[:, 3:] = -100
        given.labels[0] = -100
    frames = watched_step(device_half(own), cloud_of(own), given, pipeline=2)
    for what in ("hidden", "hidden-gradient"):
        found = [
            len(frame.tensor)
            for _, frame in frames
            if isinstance(frame, Values) and frame.what == what
        ]
        # a row without a target may send one for form
        assert len(found) == 2 and sum(found) in (rows, rows + 1)


# Two devices


def test_two_devices_never_see_each_others_numbers(model_folder: Folder) -> None:
    own = config(
        model_folder("bert", "classification"), pooling="mean", **{"train.model_dropout": 0.1}
    )
    cloud = cloud_of(own)

    def life(seed: int, meet: Callable[[], object]) -> tuple[torch.Tensor, Factors]:
        half = halves_of[seed]
        calls = link(half, cloud, 2, device=f"phone-{seed}", seen=lambda up, frame: meet())
        # torch's own generator is one for all threads
        seeds, plain = itertools.count(1000 * seed), calls.forward
        calls.forward = lambda request, keep: plain(replace(request, seed=next(seeds)), keep)  # type: ignore[method-assign]
        values = factors(half.model, seed)
        return train(half.model, values, some_steps(4, lengths=(3 + seed, 5, 4)), "sgd")

    halves_of = [device_half(own) for _ in range(2)]
    alone = [life(seed, lambda: None) for seed in range(2)]
    halves_of = [device_half(own) for _ in range(2)]
    together: dict[int, tuple[torch.Tensor, Factors]] = {}
    turns = threading.Barrier(2)

    def take_turns() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            turns.wait(timeout=0.5)  # frame by frame side by side, as long as both have some

    def run(seed: int) -> None:
        together[seed] = life(seed, take_turns)
        turns.abort()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        assert torch.equal(together[seed][0], alone[seed][0])
        assert all(
            torch.equal(value, alone[seed][1][name]) for name, value in together[seed][1].items()
        )
    assert not torch.equal(alone[0][0], alone[1][0])


@pytest.mark.parametrize("what", ["update", "hidden-gradient", "input-gradient"])
def test_a_stalled_device_stops_nobody(model_folder: Folder, what: str) -> None:
    """One device is silent in the midst of its forward or backward while another one trains."""
    own = config(model_folder("bert", "classification"))
    cloud, stalled, resume = cloud_of(own), threading.Event(), threading.Event()

    def stall(up: bool, frame: SplitFrame) -> None:
        if isinstance(frame, Values) and frame.what == what and not stalled.is_set():
            stalled.set()
            assert resume.wait(30)

    slow, quick = device_half(own), device_half(own)
    link(slow, cloud, device="slow", seen=stall)
    link(quick, cloud, device="quick")
    found: list[tuple[torch.Tensor, Factors]] = []
    thread = threading.Thread(
        target=lambda: found.append(step_of(slow.model, factors(slow.model), batch()))
    )
    thread.start()
    assert stalled.wait(30)
    ours = step_of(quick.model, factors(quick.model), batch())  # would never end if it had to wait
    assert not found
    resume.set()
    thread.join()
    assert torch.equal(found[0][0], ours[0]) and all(
        torch.equal(found[0][1][name], value) for name, value in ours[1].items()
    )


# Ordinary torch use


def linked(model_folder: Folder, **overrides: Any) -> tuple[Half, QueueCloud, Factors]:
    own = config(model_folder("bert", "classification"), **overrides)
    half, cloud = device_half(own), cloud_of(own)
    link(half, cloud)
    values = factors(half.model)
    half.model.use(values)
    half.model.network.train()
    return half, cloud, values


def test_two_forwards_before_one_backward(model_folder: Folder) -> None:
    half, cloud, values = linked(model_folder)
    (loss_of(half, batch(seed=1)) + 2 * loss_of(half, batch(seed=2))).backward()
    together = {
        name: value.grad.clone() for name, value in values.items() if value.grad is not None
    }
    for value in values.values():
        value.grad = None
    loss_of(half, batch(seed=1)).backward()
    (2 * loss_of(half, batch(seed=2))).backward()
    for name, value in values.items():
        torch.testing.assert_close(value.grad, together[name])
    assert cloud.channels[0].session.num_parts == 0


def test_backward_twice_is_refused_as_torch_does(model_folder: Folder) -> None:
    half, _, values = linked(model_folder)
    hidden = half.model.network.base_model(
        batch().input_ids, attention_mask=batch().attention_mask
    ).pooler_output
    loss = hidden.sum()  # nothing but the remote part keeps tensors here
    loss.backward(retain_graph=True)
    once = {name: value.grad.clone() for name, value in values.items() if value.grad is not None}
    loss.backward()  # kept on purpose: the cloud goes through it again
    for name, gradient in once.items():
        torch.testing.assert_close(values[name].grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_factors_changed_before_the_backward_are_noticed(model_folder: Folder) -> None:
    half, _, values = linked(model_folder)
    loss = loss_of(half, batch())
    with torch.no_grad():
        next(iter(values.values())).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_nothing_is_kept(model_folder: Folder) -> None:
    half, cloud, values = linked(model_folder, **{"train.model_dropout": None})
    seen: list[SplitFrame] = []
    link(half, cloud, seen=lambda up, frame: seen.append(frame))
    half.model.network.eval()
    with torch.no_grad():
        one, other = (forward(half.model, batch()) for _ in range(2))
    assert torch.equal(one, other) and not one.requires_grad
    begins = [frame for frame in seen if isinstance(frame, Begin)]
    assert [(begin.keep, begin.seed) for begin in begins] == [(False, None)] * 2
    half.model.network.train()
    for name, value in values.items():
        value.requires_grad_("lora_" not in name)
    seen.clear()
    loss_of(half, batch()).backward()  # the head alone trains: no gradient travels
    assert [frame.what for frame in seen if isinstance(frame, Values)].count("hidden-gradient") == 0
    assert all((value.grad is not None) == ("lora_" not in name) for name, value in values.items())
    assert cloud.budget.free_bytes == cloud.budget.num_bytes


def test_the_device_holds_nothing_of_the_body(model_folder: Folder) -> None:
    own = config(model_folder("llama", "causal-lm"), "causal-lm")
    half, whole = device_half(own), whole_model(own)
    network = half.model.network
    tensors = [*network.named_parameters(), *network.named_buffers(), *network.state_dict().items()]
    assert {name for name, _ in tensors} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not any(tensor.is_meta for _, tensor in tensors)
    assert network.to("cpu") is network and network.float().dtype == torch.float32
    assert type(network).__name__ == "LlamaForCausalLM" and isinstance(network, type(whole.network))
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        network.gradient_checkpointing_enable()


# Bodies that cannot be split


def tiny_config(kind: Any, **more: Any) -> Any:
    sizes = {
        "vocab_size": 20,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    return kind(**sizes | more)


def test_bodies_that_cannot_be_split_are_refused() -> None:
    t5 = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    # one layer, gone through twice
    shared = tiny_config(transformers.AlbertConfig, embedding_size=32)
    ctrl = transformers.PerceiverConfig(num_latents=4, d_latents=16, d_model=16, num_blocks=1)
    for kind, reason in (
        (t5, "token ids inside"),
        (shared, "called twice"),
        (ctrl, "no inputs_embeds"),
    ):
        with pytest.raises(ModelError, match=reason):
            find_groups(lambda kind=kind: transformers.AutoModel.from_config(kind))  # type: ignore[misc]


def test_targets_outside_the_body_are_refused(model_folder: Folder) -> None:
    own = config(
        model_folder("llama", "causal-lm"),
        "causal-lm",
        **{"lora.target_modules": ["q_proj", "lm_head"]},
    )
    with pytest.raises(ModelError, match="lora.target_modules: lm_head is not in the body"):
        load_half(own, load_tokenizer(own.model), labels(own))
    groups = find_groups(
        lambda: transformers.AutoModel.from_config(tiny_config(transformers.LlamaConfig))
    )
    with pytest.raises(
        ModelError, match="no_proj is not in the body; there are down_proj, gate_proj"
    ):
        active_groups(groups, ["no_proj"])


@pytest.mark.slow
def test_a_quantised_body_is_the_quantised_model(model_folder: Folder) -> None:
    """nf4 on a CPU: bitsandbytes must not repack the cloud's weights into its form without a
    backward.
    """
    pytest.importorskip("bitsandbytes")
    folder = model_folder("llama", "causal-lm")
    own = config(folder, "causal-lm")
    whole = whole_model(
        Config.parse(own.model_dump(mode="json") | {"split": None, "quantization": "nf4"})
    )
    body = load_body(
        CloudConfig.parse({"model": str(folder), "device": "cpu", "quantization": "nf4"})
    )
    half = device_half(own)
    link(half, QueueCloud(body))
    steps = some_steps(5, "causal-lm")
    ours, reference = (train(model, factors(model), steps, "sgd") for model in (half.model, whole))
    assert_same_training(ours, reference, "sgd")


def test_a_body_that_looks_at_padding_is_refused() -> None:
    """ConvBERT's convolutions mix what stands at padding into the tokens beside it, and the halves
    pad differently.
    """
    tiny_conv = transformers.ConvBertConfig(
        vocab_size=20, hidden_size=32, embedding_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    with pytest.raises(ModelError, match="see what stands at padding"):
        Body(transformers.AutoModel.from_config(tiny_conv))


def test_targets_at_padding_are_refused(model_folder: Folder) -> None:
    """transformers would count them in the loss; their hidden states never come down."""
    own = config(model_folder("llama", "causal-lm"), "causal-lm")
    half = device_half(own)
    model = as_ordinary(half)
    assert not model.training  # as from_pretrained gives it
    rows = batch("causal-lm")
    with pytest.raises(ConfigError, match="set them to -100"):
        model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.input_ids)
