"""Loads the frozen model, its tokenizer, or only the body; quantises it if asked."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import dlora.model.quiet  # noqa: F401  # before transformers is imported

# isort: split
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.config.tasks import TASKS
from dlora.errors import ModelError
from dlora.model.files import FORMS, NO_CODE, SAFE_WEIGHTS, find_model, read_config
from dlora.model.layers import LINEAR, block_linears, dropout_keys, max_tokens
from dlora.model.quiet import quietly


class MeanPooledClassifier(nn.Module):
    """A classifier: a transformers body, the mean over its real tokens, and one new linear.

    Sentence encoders are trained to give such a mean.
    """

    base_model_prefix = "body"

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.config = body.config
        self.body = body
        self.classifier = nn.Linear(body.config.hidden_size, body.config.num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)  # as BERT and Llama initialise theirs
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **ignored: Any,
    ) -> SequenceClassifierOutput:
        """Logits (batch, classes), and transformers' loss if ``labels`` are given.

        ``input_ids`` and ``attention_mask`` are (batch, length). PEFT passes other keywords, which
        are ignored.
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden_BLH = self.body(
            input_ids=input_ids, attention_mask=attention_mask, **types
        ).last_hidden_state
        real_BL1 = attention_mask.unsqueeze(-1).to(hidden_BLH.dtype)
        logits = self.classifier((hidden_BLH * real_BL1).sum(1) / real_BL1.sum(1))
        loss = None
        if labels is not None:
            loss = ForSequenceClassificationLoss(labels, logits.float(), self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass(frozen=True)
class FrozenModel:
    """A frozen model, and the names of its new modules.

    ``head``: names of the modules whose weights the checkpoint does not hold (a classifier). They
    are drawn from the run's seed and saved with the adapter.
    """

    network: Any  # transformers.PreTrainedModel
    source: str
    head: tuple[str, ...]


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer. If it has no pad token, the end-of-text token is used for padding.

    Raises ModelError when there is no usable tokenizer.
    """
    source = find_model(model)
    with quietly():
        try:
            read_config(source)  # refuses a folder before anything in it is used
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **NO_CODE)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"model {model}: no tokenizer can be loaded from {source} ({_first_line(error)});"
                f" {FORMS}"
            ) from error
    # transformers makes an empty tokenizer when the files are missing
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(
            f"model {model}: {source} holds no tokenizer (no tokenizer.json or vocabulary); {FORMS}"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"model {model}: its tokenizer has neither a pad nor an end-of-text token to pad"
                " with"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(
    config: Config,
    tokenizer: Any,
    label_names: Sequence[str] | None,
    blocks: bool = True,
    device: torch.device | None = None,
) -> FrozenModel:
    """Load the frozen model; new heads are drawn on the CPU from ``config.seed``.

    ``blocks=False``: the transformer blocks are left out and their weights are not read; all other
    weights are bit-equal. ``device``: where the model is put; None: where the config says. Raises
    ModelError.
    """
    source = find_model(config.model)
    arguments: dict[str, Any] = {
        "dtype": torch.float32,
        "pad_token_id": tokenizer.pad_token_id,
        **NO_CODE,
        **SAFE_WEIGHTS,
    }
    # a head for another task is replaced by ours; _new_modules refuses mismatches in the body
    arguments["ignore_mismatched_sizes"] = True
    task, mean = TASKS[config.task], config.pooling == "mean"
    factory: Any = transformers.AutoModel if mean else getattr(transformers, task.model)
    if task.has_head:
        arguments |= {"num_labels": 1, "problem_type": task.problem_type}
    if label_names is not None:
        arguments |= {
            "num_labels": len(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {name: index for index, name in enumerate(label_names)},
        }
    with quietly():
        try:
            model_config = read_config(source)
            _refuse_architecture(config, model_config, factory)
            if not hasattr(model_config, "pad_token_id"):  # RWKV's
                del arguments["pad_token_id"]
            if config.train.model_dropout is not None:
                arguments |= dict.fromkeys(dropout_keys(model_config), config.train.model_dropout)
            if config.quantization != "none":
                arguments["quantization_config"] = _quantization(
                    config.quantization, factory, model_config
                )
            if config.device_map is not None:
                arguments["device_map"] = config.device_map
            if not blocks:
                arguments["num_hidden_layers"] = 0
                if getattr(model_config, "layer_types", None) is not None:
                    arguments["layer_types"] = []
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                network, report = factory.from_pretrained(
                    source, output_loading_info=True, **arguments
                )
                for child in network.children():  # of a head whose rate is in no config
                    if isinstance(child, nn.Dropout) and config.train.model_dropout is not None:
                        child.p = config.train.model_dropout
                missing = set(report["missing_keys"]) | {
                    key for key, *_shapes in report["mismatched_keys"]
                }
                if config.train.gradient_checkpointing:
                    network.gradient_checkpointing_enable({"use_reentrant": False})
                    network.config.use_cache = False
                if mean:
                    network = MeanPooledClassifier(network)
                    # the pooler is not used
                    missing = {f"body.{key}" for key in missing if not key.startswith("pooler.")}
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"model {config.model}: cannot be loaded from {source} ({_first_line(error)});"
                f" {FORMS}"
            ) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            what = "is not made" if blocks else "cannot be split, without its blocks it is not made"
            raise ModelError(
                f"model {config.model}: {model_config.model_type} {what} ({type(error).__name__}:"
                f" {_first_line(error)})"
            ) from error
    longest = max_tokens(network)
    if longest is not None and config.data.max_length > longest:
        raise ModelError(
            f"data.max_length {config.data.max_length}: model {config.model} takes {longest} tokens"
            " at most; lower it"
        )
    _refuse_tokens(network, tokenizer, config.model)
    _freeze(network)
    if config.device_map is not None:
        _refuse_offload(network, config)
    else:
        device = device or resolve_device(config.device)
        if config.quantization == "none" or device.type != "cpu":
            network.to(device)
    return FrozenModel(network, source, _new_modules(network, missing, config))


def _refuse_offload(network: Any, config: Config) -> None:
    """Raise ModelError when a device map leaves weights on no device that computes."""
    if any(weight.is_meta for weight in network.parameters()):
        raise ModelError(
            f"model {config.model}: device_map {config.device_map} leaves weights on the CPU or the"
            " disk, because they do not fit; take quantization nf4, or more GPUs, or shard_model"
        )


def _refuse_architecture(config: Config, model_config: Any, factory: Any) -> None:
    """Raise ModelError when transformers has no class of this architecture for the task."""
    if type(model_config) in factory._model_mapping:
        return
    kind = model_config.model_type
    if TASKS[config.task].has_head:
        raise ModelError(
            f"model {config.model}: transformers has no classifier of the architecture {kind}; take"
            " another model, or pooling: mean where it is an encoder"
        )
    what = (
        "reads one text and writes another"
        if getattr(model_config, "is_encoder_decoder", False)
        else "writes no text"
    )
    raise ModelError(
        f"model {config.model}: task causal-lm wants a decoder, such as Llama, Qwen or GPT-2; the"
        f" architecture {kind} {what}: take another model, or task: classification"
    )


def _refuse_tokens(network: Any, tokenizer: Any, model: str) -> None:
    """Raise ModelError when the tokenizer gives ids for which the embedding has no row.

    More rows than ids are usual and allowed.
    """
    embedding = (
        network.body.get_input_embeddings()
        if hasattr(network, "body")
        else network.get_input_embeddings()
    )
    if not isinstance(embedding, nn.Embedding):  # CANINE hashes characters instead
        return
    largest = max(tokenizer.get_vocab().values())
    if largest >= embedding.num_embeddings:
        raise ModelError(
            f"model {model}: its tokenizer has {largest + 1} tokens, its embedding"
            f" {embedding.num_embeddings} rows; give the tokenizer that belongs to it, or the model"
            " with resize_token_embeddings applied"
        )


def load_body_network(config: CloudConfig) -> Any:
    """The body that a cloud serves, on its device or devices.

    Raises ModelError when it cannot be loaded or when weights are missing in its folder.
    """
    source = find_model(config.model)
    arguments: dict[str, Any] = {"dtype": getattr(torch, config.dtype), **NO_CODE, **SAFE_WEIGHTS}
    with quietly():
        try:
            model_config = read_config(source)
            if config.quantization != "none":
                arguments["quantization_config"] = _quantization(
                    config.quantization, transformers.AutoModel, model_config
                )
            if config.device_map is not None:
                arguments["device_map"] = config.device_map
            network, report = transformers.AutoModel.from_pretrained(
                source, output_loading_info=True, **arguments
            )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"model {config.model}: cannot be loaded from {source} ({_first_line(error)});"
                f" {FORMS}"
            ) from error
    missing = {key for key in report["missing_keys"] if not key.startswith("pooler.")}
    if missing:
        raise ModelError(
            f"model {config.model}: its folder has no weights for {', '.join(sorted(missing)[:3])}"
        )
    if report["missing_keys"]:
        network.pooler = None  # else devices would train on a random pooler
    _freeze(network)
    device = resolve_device(config.device)
    if config.device_map is None and (config.quantization == "none" or device.type != "cpu"):
        network.to(device)
    return network


def _freeze(network: Any) -> None:
    network.requires_grad_(False)
    for layer in network.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On a CPU, bitsandbytes repacks 4-bit weights at the first evaluation. The new form has
            # no backward pass, so training after it would be wrong.
            layer.support_avx512bf16_for_cpu = False


def resolve_device(device: str) -> torch.device:
    """The torch device of this name; ``auto`` is the first accelerator, or the CPU if none.

    Raises ModelError when the device is not available.
    """
    if device == "auto":
        # without check_available, a torch built for GPUs names one even if there is none
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device}: not available here ({_first_line(error)}); take auto or cpu"
        ) from error
    return resolved


def body_maker(network: Any) -> Callable[[], Any]:
    """A function that makes another body of this architecture, without head.

    The weights of that body are not initialised.
    """
    return no_init_weights()(lambda: transformers.AutoModel.from_config(network.config, **NO_CODE))  # type: ignore[no-any-return]


def _new_modules(network: Any, missing: set[str], config: Config) -> tuple[str, ...]:
    """The names of the head's modules.

    They are the modules with weights beside the body, and linears in the body for which the
    checkpoint has no weights. Raises ModelError when weights of another body module are missing.
    """
    outside: list[str] = []
    if TASKS[config.task].has_head:
        body = network.base_model_prefix
        outside = [
            name
            for name, child in network.named_children()
            if name != body and any(True for _ in child.parameters())
        ]
    inside = sorted({key.rpartition(".")[0] for key in missing} - {""})
    inside = [name for name in inside if not name.startswith(tuple(outside)) or not outside]
    foreign = [
        name
        for name in inside
        if name in block_linears(network) or not isinstance(network.get_submodule(name), nn.Linear)
    ]
    if foreign:
        raise ModelError(
            f"model {config.model}: its folder has no fitting weights for"
            f" {', '.join(foreign[:3])}{' and others' if len(foreign) > 3 else ''}; is it a"
            f" {config.task} model of this architecture?"
        )
    return (*outside, *inside)


def _quantization(kind: Literal["int8", "nf4"], factory: Any, model_config: Any) -> Any:
    """The configuration for bitsandbytes. Only linears of the transformer blocks are quantised.

    Raises ModelError when bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization {kind} needs bitsandbytes; pip install dlora[4bit]")
    with torch.device("meta"):
        skeleton = factory.from_config(model_config, **NO_CODE)
    blocks = set(block_linears(skeleton))
    beside = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, LINEAR) and name not in blocks
    ]
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=beside)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=beside,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
