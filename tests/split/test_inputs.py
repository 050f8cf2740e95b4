"""Law 6 or a refusal for every input of a transformers forward. PEFT is the oracle."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.utils import TransformersKwargs

from dlora.errors import ConfigError
from dlora.split.device.inputs import HERE, REFUSED, SAID_AGAIN, SENT, check_names
from kit.remote_inputs import (
    CLASSES,
    LM,
    ROWS,
    Folder,
    Given,
    assert_same,
    loss_looks,
    plain,
    remote_and_whole,
)

SHAPE = ROWS.input_ids.shape
GENERATOR = torch.Generator().manual_seed(3)
FAR = torch.arange(SHAPE[1]).expand(SHAPE) + 4
# name -> what is given beside input_ids, attention_mask and labels; None takes one of these away
ACCEPTED: dict[str, Given] = {
    "input_ids": {},
    "inputs_embeds": {
        "input_ids": None,
        "inputs_embeds": torch.randn(*SHAPE, 64, generator=GENERATOR),
    },
    "attention_mask": {"attention_mask": None},
    "attention_mask of floats": {"attention_mask": ROWS.attention_mask.float()},
    "token_type_ids": {"token_type_ids": torch.zeros(SHAPE, dtype=torch.long)},
    "position_ids": {"position_ids": FAR},
    "position_ids of one row": {"position_ids": FAR[:1]},
    "position_ids that begin again, with a mask": {"position_ids": FAR % 3},
    "labels": {},
    "no labels": {"labels": None},
    "shift_labels": {
        "shift_labels": torch.nn.functional.pad(ROWS.labels[:, 1:], (0, 1), value=-100)
    },
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(7)},
    "logits_to_keep": {"labels": None, "attention_mask": None, "logits_to_keep": 2},
    "return_dict": {"return_dict": False},
    "loss_positions": {},
    "flags that are off": {
        "output_hidden_states": False,
        "output_attentions": False,
        "use_cache": False,
    },
    **dict.fromkeys(SAID_AGAIN, {}),  # with packed rows, above
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize(
    ("family", "task"), [("llama", LM), ("bert", CLASSES), ("gpt2", CLASSES), ("opt", LM)]
)
def test_every_input_is_right(model_folder: Folder, family: str, task: str, name: str) -> None:
    given = {
        key: value for key, value in {**plain(task), **ACCEPTED[name]}.items() if value is not None
    }
    remote, whole = remote_and_whole(model_folder, family, task)
    forward = inspect.signature(type(whole.base_model.model).forward).parameters
    loss_of_classes = task == CLASSES and (
        "shift_labels" in given or "num_items_in_batch" in given or "logits_to_keep" in given
    )
    if loss_of_classes or (family == "opt" and "token_type_ids" in given):
        pytest.skip("transformers has no such input there")
    if family == "gpt2" and name == "attention_mask":
        pytest.skip("reads the last token by its id; test_heads_that_would_read_padding")
    if family == "gpt2" and name == "inputs_embeds":
        with pytest.raises(
            ConfigError, match="without input_ids the last place, and the mask says padding there"
        ):
            remote(**given)
        return
    assert forward.keys() & given.keys() or "kwargs" in forward
    looks: Any = slice(None)
    if task == LM and "logits_to_keep" not in given:
        looks = given.get("attention_mask", torch.ones(SHAPE)) != 0
        if "labels" in given:
            looks = looks & loss_looks(given["labels"])
    assert_same(remote, whole, given, looks)


WORTHLESS: dict[str, Any] = {  # name -> a value that asks for what cannot be had
    "past_key_values": transformers.DynamicCache(),
    "use_cache": True,
    "cache_position": torch.arange(SHAPE[1]),
    "output_hidden_states": True,
    "output_attentions": True,
    "output_router_logits": True,
    "is_causal": True,
    "head_mask": torch.ones(2, 4),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(("family", "task"), [("llama", LM), ("bert", CLASSES)])
def test_what_is_neither_sent_nor_here_is_refused(
    model_folder: Folder, family: str, task: str, name: str
) -> None:
    """`output_hidden_states=True` was ignored. Of the head and of the body alike: some programs
    call the body themselves.
    """
    remote, _ = remote_and_whole(model_folder, family, task)
    given = {"input_ids": ROWS.input_ids, name: WORTHLESS[name]}
    for model in (remote, remote.base_model):
        with pytest.raises(ConfigError, match=f"^{name}: "):
            model(**given)


QUICK = (
    "LlamaForCausalLM",
    "BertForSequenceClassification",
    "GPT2ForSequenceClassification",
    "OPTForCausalLM",
)
ALL = sorted(
    name
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )
    for name in mapping.values()
    if isinstance(name, str)
)


@pytest.mark.parametrize(
    "class_names", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_every_input_that_transformers_has_is_in_the_table(class_names: Sequence[str]) -> None:
    """Whatever any language model or classifier takes: known to be right (a test above), or
    refused.
    """
    names = {*TransformersKwargs.__annotations__}
    for class_name in class_names:
        names |= inspect.signature(getattr(transformers, class_name).forward).parameters.keys() - {
            "self",
            "kwargs",
            "args",
        }
    assert (
        len(names) > (18 if class_names == QUICK else 60)
        and {"seq_idx", "past_key_values", "logits_to_keep"} <= names
    )
    for name in sorted(names - {*SENT, *HERE, *SAID_AGAIN}):
        with pytest.raises(ConfigError, match=f"^{name}: "):
            check_names({name: torch.zeros(1)}, None)
    assert {*SENT, *HERE, *SAID_AGAIN} <= ACCEPTED.keys() and WORTHLESS.keys() == REFUSED.keys()
    for unheard in ("ignore_index", "pixel_values", "labelz"):
        with pytest.raises(
            ConfigError, match=f"^{unheard}: a split model takes input_ids, .*; remove it"
        ):
            check_names({unheard: 0}, None)


@pytest.mark.parametrize(
    "name", ["output_hidden_states", "output_attentions", "output_router_logits"]
)
def test_a_config_that_asks_for_it_is_refused_too(
    model_folder: Folder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, _ = remote_and_whole(model_folder, "llama", LM)
    monkeypatch.setitem(
        vars(remote.config), f"_{name}" if name == "output_attentions" else name, True
    )
    with pytest.raises(
        ConfigError, match=f"{name} in the model's config: .* set it to False there"
    ):
        remote(input_ids=ROWS.input_ids)


MASK_4D = torch.ones(4, 1, SHAPE[1], SHAPE[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention_mask": MASK_4D},
            r"attention_mask has shape \(4, 1, 9, 9\); expected \(4, 9\)",
        ),
        (
            {"attention_mask": {"full_attention": MASK_4D}},
            "attention_mask has shape dict; expected",
        ),
        ({"attention_mask": torch.zeros(SHAPE)}, "leaves a row without any token"),
        ({"position_ids": FAR.expand(3, *SHAPE)}, r"position_ids has shape \(3, 4, 9\)"),
        ({"position_ids": FAR - 5}, "position_ids holds -1; expected whole numbers from 0 on"),
        ({"token_type_ids": FAR + 300}, "token_type_ids go to 312; a split takes 0 to 255"),
        (
            {"inputs_embeds": torch.zeros(*SHAPE, 64)},
            "input_ids or inputs_embeds, and one of them only",
        ),
        ({"input_ids": None}, "input_ids or inputs_embeds, and one of them only"),
        (
            {"input_ids": ROWS.input_ids + 10},
            "go from 10 to 2[0-9]; the model has 20 tokens: take its own tokenizer",
        ),
        ({"input_ids": ROWS.input_ids[0]}, r"input_ids of shape \(9,\)"),
    ],
)
def test_inputs_of_another_form_are_refused(
    model_folder: Folder, change: Given, message: str
) -> None:
    """Field case 4's sibling: an id beyond the table is no traceback."""
    remote, _ = remote_and_whole(model_folder, "llama", LM)
    given = {"input_ids": ROWS.input_ids, "attention_mask": ROWS.attention_mask} | change
    with pytest.raises(ConfigError, match=message):
        remote(**{key: value for key, value in given.items() if value is not None})


def test_arguments_by_place_are_those_of_the_model(model_folder: Folder) -> None:
    """Llama's third is position_ids, BERT's token_type_ids; the body's own order counts when it is
    called itself.
    """
    for family, task in (("llama", LM), ("bert", CLASSES)):
        remote, whole = remote_and_whole(model_folder, family, task)
        third = FAR if family == "llama" else (FAR > 6).long()
        with torch.no_grad():
            for ours, theirs in (
                (remote, whole.base_model.model),
                (remote.base_model, whole.base_model.model.base_model),
            ):
                found, expected = (
                    model(ROWS.input_ids, ROWS.attention_mask, third)[0] for model in (ours, theirs)
                )
                real = (
                    ROWS.attention_mask.bool()
                    if found.dim() == 3 and ours is remote
                    else slice(None)
                )
                # its head reads the pooled output alone
                if ours is not remote and family == "bert":
                    found, expected = (
                        model(ROWS.input_ids, ROWS.attention_mask, third)[1]
                        for model in (ours, theirs)
                    )
                elif ours is not remote:
                    real = ROWS.attention_mask.bool()
                torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
        with pytest.raises(ConfigError, match="give each once, by its name"):
            remote(ROWS.input_ids, input_ids=ROWS.input_ids)


def test_a_loss_that_looks_at_padding_is_refused(model_folder: Folder) -> None:
    """A left-padded row's first token, foretold by a pad: transformers counts it, and nothing comes
    down for a pad.
    """
    remote, whole = remote_and_whole(model_folder, "llama", LM)
    ids = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    mask = (ids != 0).long()
    labels = ids.masked_fill(mask == 0, -100)
    with pytest.raises(
        ConfigError, match="targets that padding would foretell .*: set them to -100"
    ):
        remote(input_ids=ids, attention_mask=mask, labels=labels)
    labels[0, 2] = -100
    assert_same(
        remote,
        whole,
        {"input_ids": ids, "attention_mask": mask, "labels": labels},
        loss_looks(labels),
    )
    shifted = {"labels": labels, "shift_labels": ids}
    with pytest.raises(ConfigError, match="targets that padding would foretell"):
        remote(input_ids=ids, attention_mask=mask, **shifted)
    right = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    # the end of the text, told by its last token
    one_pad = right["input_ids"].masked_fill(torch.arange(5) == 4, -100)
    assert_same(remote, whole, {**right, "labels": one_pad}, loss_looks(one_pad))


def test_heads_that_would_read_padding(model_folder: Folder) -> None:
    """Llama's classifier takes the last token whose id is no pad, whatever the mask says."""
    remote, whole = remote_and_whole(model_folder, "llama", CLASSES)
    ids, mask = (
        torch.tensor([[5, 6, 7, 9], [5, 6, 7, 8]]),
        torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    )
    with pytest.raises(ConfigError, match="the mask says padding there; pad with the id 0"):
        remote(input_ids=ids, attention_mask=mask)
    assert_same(
        remote,
        whole,
        {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1])},
    )
    embedded = whole.get_input_embeddings()(ids).detach()
    assert_same(remote, whole, {"inputs_embeds": embedded, "labels": torch.tensor([0, 1])})
    first, _ = remote_and_whole(model_folder, "bert", CLASSES)
    with pytest.raises(
        ConfigError, match="reads the first token, which is padding; pad on the right"
    ):
        first(input_ids=ids, attention_mask=mask.flip(1))


def test_logits_that_did_not_come_are_no_numbers(model_folder: Folder) -> None:
    """Given labels, hidden states come down where the loss looks; a metric that reads others was
    silently wrong.
    """
    remote, whole = remote_and_whole(model_folder, "llama", LM)
    given = plain(LM)
    given["labels"][:, 4:] = -100
    looks = loss_looks(given["labels"])
    assert_same(remote, whole, given, looks)
    logits = remote(**given).logits
    assert (
        logits[~looks].isnan().any(-1).sum() >= (~looks).sum() - len(looks)
        and logits[looks].isfinite().all()
    )
    assert (
        remote(**{key: given[key] for key in ("input_ids", "attention_mask")})
        .logits.isfinite()
        .all()
    )
