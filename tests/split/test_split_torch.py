"""A split model in ordinary torch use, and bodies that cannot be split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.errors import ConfigError, ModelError
from dlora.lora.factors import Factors
from dlora.lora.units import adapted_units, find_units
from dlora.model.load import load_tokenizer
from dlora.split.cloud.body import Body, load_body
from dlora.split.device.half import Half, as_ordinary, load_half
from dlora.train import forward
from dlora.wire.split.frames import Begin, SplitFrame, Values
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
from kit.split_steps import cloud_of, loss_of
from kit.split_training import assert_same_training, some_steps, train

Folder = Callable[[str, str], Path]


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
            find_units(lambda kind=kind: transformers.AutoModel.from_config(kind))  # type: ignore[misc]


def test_targets_outside_the_body_are_refused(model_folder: Folder) -> None:
    own = config(
        model_folder("llama", "causal-lm"),
        "causal-lm",
        **{"lora.target_modules": ["q_proj", "lm_head"]},
    )
    with pytest.raises(ModelError, match="lora.target_modules: lm_head is not in the body"):
        load_half(own, load_tokenizer(own.model), labels(own))
    units = find_units(
        lambda: transformers.AutoModel.from_config(tiny_config(transformers.LlamaConfig))
    )
    with pytest.raises(
        ModelError, match="no_proj is not in the body; there are down_proj, gate_proj"
    ):
        adapted_units(units, {"no_proj": 4})


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
