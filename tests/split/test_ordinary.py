"""What programs around transformers do with a model: right on one whose body is elsewhere, or
refused in one line.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dlora.errors import ConfigError
from dlora.split.device.half import as_ordinary
from dlora.split.device.transformers_class import REFUSED_METHODS
from kit import queue_cloud
from kit.remote_inputs import (
    CLASSES,
    LM,
    MADE,
    ROWS,
    assert_same,
    loss_looks,
    plain,
    remote_and_whole,
)

Folder = Callable[..., Path]


@pytest.fixture
def pair(model_folder: Folder) -> Iterator[tuple[Any, Any]]:
    """A new one for each test, which may spoil it."""
    MADE.pop(("llama", LM), None)
    yield remote_and_whole(model_folder, "llama", LM)
    MADE.pop(("llama", LM), None)


def weights(remote: Any) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().clone()
        for name, value in remote.named_parameters()
        if value.requires_grad
    }


# Refused


CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "gradient_checkpointing_enable": (
        lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
        "write gradient_checkpointing=False in TrainingArguments or SFTConfig",
    ),
    "set_attn_implementation": (
        lambda model: model.set_attn_implementation("eager"),
        "the cloud attends in its own way",
    ),
    "set_input_embeddings": (
        lambda model: model.set_input_embeddings(torch.nn.Embedding(4, 4)),
        "no token can be added",
    ),
    "add_adapter": (
        lambda model: model.add_adapter(peft.LoraConfig()),
        "a second one would train nothing",
    ),
    "load_adapter": (
        lambda model: model.load_adapter("folder"),
        "Weights of a checkpoint: load_state_dict",
    ),
    "_replicate_for_data_parallel": (
        lambda model: model._replicate_for_data_parallel(),
        "CUDA_VISIBLE_DEVICES=0",
    ),
    "__deepcopy__": (copy.deepcopy, "^copy.deepcopy: a split model is one link to one cloud"),
    "__reduce_ex__": (pickle.dumps, "^pickle: a split model is one link to one cloud"),
    "torch.save": (
        lambda model: torch.save(model, io.BytesIO()),
        r"pickle: .*, or copy state_dict\(\)",
    ),
    "copy": (copy.copy, "make another with dlora.connect"),
    "resize": (
        lambda model: model.resize_token_embeddings(24),
        r"^resize_token_embeddings\(24\): the cloud has the model's own",
    ),
    "push": (
        lambda model: model.save_pretrained("never", push_to_hub=True),
        r"then call push_to_hub\(repository\)",
    ),
    "embedding": (
        lambda model: model.requires_grad_(True) and model(ROWS.input_ids),
        "token embedding asks for a gradient",
    ),
    "half": (
        lambda model: model.to(torch.bfloat16)(ROWS.input_ids),
        "the factors are no float32 any more",
    ),
    "eager": (
        lambda model: (
            model.config.__setattr__("_attn_implementation", "eager") or model(ROWS.input_ids)
        ),
        "attn_implementation eager: the cloud attends in its own way; take sdpa again",
    ),
    "a second peft": (
        lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))(
            ROWS.input_ids
        ),
        "a second adapter|not supported",
    ),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_right_is_refused(pair: tuple[Any, Any], name: str) -> None:
    act, message = CALLS[name]
    with pytest.raises((ConfigError, ValueError), match=message) as refusal:
        act(pair[0])
    assert "\n" not in str(refusal.value) or name == "a second peft"  # that one is PEFT's own
    assert CALLS.keys() >= REFUSED_METHODS.keys()


@pytest.mark.parametrize("spoil", ["rate", "mode"])
def test_dropout_changed_in_a_body_that_is_not_here_is_refused(
    model_folder: Folder, spoil: str
) -> None:
    """As programs do that switch dropout off, module by module: the cloud would go on dropping."""
    MADE.pop(("bert", CLASSES), None)
    remote, _ = remote_and_whole(model_folder, "bert", CLASSES)
    MADE.pop(("bert", CLASSES))
    remote.train()
    layers = [layer for layer in remote.base_model.modules() if isinstance(layer, torch.nn.Dropout)]
    remote(**plain(CLASSES))
    if spoil == "rate":
        layers[-1].p = 0.5
    else:
        layers[-1].eval()
    with pytest.raises(
        ConfigError,
        match="dropout was changed in the body, which draws it in the cloud: give train.model_",
    ):
        remote(**plain(CLASSES))


# Right


def test_a_state_dict_goes_out_and_in(pair: tuple[Any, Any], tmp_path: Path) -> None:
    remote, whole = pair
    state = {name: value.clone() for name, value in remote.state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    remote.save_pretrained(tmp_path / "saved", state_dict=state, max_shard_size="1GB")
    before = weights(remote)
    with torch.no_grad():
        for value in remote.parameters():
            value.mul_(3)
    remote.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(value, before[name]) for name, value in weights(remote).items())
    given = plain(LM)
    assert_same(remote, whole, given, loss_looks(given["labels"]) & given["attention_mask"].bool())
    with torch.no_grad():
        for value in remote.parameters():
            if value.requires_grad:
                value.mul_(3)
    missing, unexpected = remote.load_state_dict(
        load_file(tmp_path / "saved" / "model.safetensors"), strict=False
    )
    assert not unexpected and set(missing) == set(remote._keys_to_ignore_on_save)
    remote.tie_weights()
    assert all(torch.equal(value, before[name]) for name, value in weights(remote).items())
    remote.save_pretrained(tmp_path / "nobody", is_main_process=False)
    assert not (tmp_path / "nobody").exists()


def test_moved_printed_compiled_and_run_under_autocast(pair: tuple[Any, Any]) -> None:
    remote, whole = pair
    given = plain(LM)
    looks = loss_looks(given["labels"]) & given["attention_mask"].bool()
    assert (
        "LlamaForCausalLM" in repr(remote)
        and remote.to("cpu").float() is remote
        and remote.num_parameters() > 0
    )
    assert (
        remote.resize_token_embeddings(20)
        is remote.get_input_embeddings()
        is remote.resize_token_embeddings()
    )
    remote.enable_input_require_grads()
    assert_same(remote, whole, given, looks)
    remote.disable_input_require_grads()
    compiled: Any = torch.compile(remote, backend="eager")
    assert abs(compiled(**given).loss.item() - whole(**given).loss.item()) < 1e-5
    compiled(**given).loss.backward()
    assert all(
        value.grad is not None for name, value in remote.named_parameters() if "lora_" in name
    )
    with torch.autocast("cpu", torch.bfloat16):
        rough = remote(**given).loss
        rough.backward()
    assert rough.item() == pytest.approx(whole(**given).loss.item(), abs=0.05)
    assert all(
        value.grad.dtype == torch.float32 for value in remote.parameters() if value.grad is not None
    )


def test_several_forwards_one_backward_and_none(pair: tuple[Any, Any]) -> None:
    """As training with accumulated losses, contrastive pairs and scoring in between do."""
    remote, whole = pair
    given, found = plain(LM), []
    for model in (remote, whole):
        first = model(**given).loss
        with torch.no_grad():
            alone = model(**given).loss
        second = model(**{**given, "input_ids": given["input_ids"].flip(0)}).loss
        assert not alone.requires_grad and abs(alone.item() - first.item()) < 1e-6
        model.zero_grad()
        (first + 2 * second).backward()
        found.append(
            [value.grad.clone() for name, value in model.named_parameters() if "lora_" in name]
        )
        with pytest.raises(RuntimeError, match="second time"):
            first.backward()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}],
    ids=["greedy", "beams", "sampled"],
)
def test_texts_are_written_as_beside_the_model(pair: tuple[Any, Any], how: dict[str, Any]) -> None:
    """A batch that is padded on the left. From embedded tokens transformers makes a cache, asked or
    not.
    """
    remote, whole = pair
    ids = torch.tensor([[0, 0, 5, 9], [4, 6, 7, 8]])
    given = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 6,
        "pad_token_id": 0,
        "use_cache": False,
        **how,
    }
    written = []
    for model in (remote, whole):
        torch.manual_seed(0)
        written.append(model.generate(input_ids=ids, **given))
    assert torch.equal(*written)
    with pytest.raises(ConfigError, match=r"keeps no key-value cache; call generate\(input_ids"):
        remote.generate(inputs_embeds=whole.get_input_embeddings()(ids).detach(), **given)
    remote.config.use_cache = True
    with pytest.raises(
        ConfigError, match="keeps no key-value cache; call generate.*use_cache=False"
    ):
        remote.generate(input_ids=ids, **{**given, "use_cache": True})


def test_a_class_still_loads_whole_models(pair: tuple[Any, Any], model_folder: Folder) -> None:
    remote, _ = pair
    loaded = type(remote).from_pretrained(model_folder("llama", LM))
    assert type(loaded) is transformers.LlamaForCausalLM and loaded.generation_config is not None


def test_a_mean_pooled_one_is_no_less_ordinary(model_folder: Folder, tmp_path: Path) -> None:
    own = queue_cloud.config(
        model_folder("bert", CLASSES), CLASSES, pooling="mean", **{"lora.target_modules": ["query"]}
    )
    half = queue_cloud.device_half(own)
    queue_cloud.link(half, queue_cloud.QueueCloud(queue_cloud.cloud_body(Path(own.model))))
    remote = as_ordinary(half)
    remote.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "adapter_model.safetensors",
        "model.safetensors",
    }
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match="one link to one cloud"):
            act(remote)
    with pytest.raises(ConfigError, match="^output_attentions: "):
        remote(ROWS.input_ids, ROWS.attention_mask, output_attentions=True)
    assert "MeanPooledClassifier" in repr(remote)
