"""A split model as a transformers model: what works as usual, and what is refused in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dlora.errors import ConfigError
from dlora.lora.adapter_io import save_adapter, save_trained
from dlora.split.device.inputs import by_name, check_names, loss_positions
from dlora.split.device.model import SplitModel

_TABLE = (
    "the cloud has the model's own token table, and no token can be added; take the model's own"
    " tokenizer"
)
_ONE_ADAPTER = (
    "this model has its adapter, and a second one would train nothing in the cloud; change lora in"
    " the config"
)
_ONE_LINK = (
    "a split model is one link to one cloud; make another with dlora.connect, or copy state_dict()"
)
REFUSED_METHODS = {
    "gradient_checkpointing_enable": (
        "the body runs in the cloud, which keeps its activations; write"
        " gradient_checkpointing=False in TrainingArguments or SFTConfig"
    ),
    "set_attn_implementation": "the cloud attends in its own way; leave it out",
    "set_input_embeddings": _TABLE,
    "add_adapter": _ONE_ADAPTER,
    "load_adapter": (
        f"{_ONE_ADAPTER}. Weights of a checkpoint: load_state_dict(load_file('model.safetensors'),"
        " strict=False)"
    ),
    "_replicate_for_data_parallel": (
        "DataParallel would copy the link; let the program see one GPU (CUDA_VISIBLE_DEVICES=0)"
    ),
    "__deepcopy__": _ONE_LINK,
    "__reduce_ex__": _ONE_LINK,
}
_SAID = {
    "__deepcopy__": "copy.deepcopy",
    "__reduce_ex__": "pickle",
    "_replicate_for_data_parallel": "nn.DataParallel",
    "gradient_checkpointing_enable": "gradient_checkpointing",
}


def as_remote(network: Any, model: SplitModel) -> None:
    """Change the network's class to a subclass that knows that the body runs elsewhere."""
    original, body = type(network), model.body

    class Remote(original):  # type: ignore[misc, valid-type]
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        @functools.wraps(original.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = by_name(original.forward, args, kwargs)
            check_names(given, self.config)
            looks, body.unread = given.pop("loss_positions", None), 0.0
            if looks is None and not model.task.has_head:
                looks = loss_positions(given)
                if looks is not None:
                    # NaN shows a program that it reads logits which the cloud did not send
                    body.unread = float("nan")
            body.loss_positions = looks
            try:
                return original.forward(self, **given)
            finally:
                body.loss_positions, body.unread = None, 0.0

        def save_pretrained(
            self,
            save_directory: str | Path,
            is_main_process: bool = True,
            push_to_hub: bool = False,
            **ignored: Any,
        ) -> None:
            """Write a PEFT adapter folder, without the frozen weights, which are in the cloud.

            A second file beside it holds the trained tensors under their own names, as a Trainer
            reads them when it resumes.
            """
            if push_to_hub:
                raise ConfigError(
                    "save_pretrained(push_to_hub=True): save to a folder, then call"
                    " push_to_hub(repository)"
                )
            if not is_main_process:
                return
            values = {}
            for name, initial in model.initial.items():
                module, _, attribute = name.rpartition(".")
                values[name] = (
                    getattr(self.get_submodule(module), attribute)
                    .detach()
                    .reshape(1, *initial.shape)
                )
            save_adapter(Path(save_directory), values, model)
            save_trained(Path(save_directory), values)

        def resize_token_embeddings(
            self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            table = self.get_input_embeddings()
            if new_num_tokens not in (None, table.num_embeddings):
                raise ConfigError(f"resize_token_embeddings({new_num_tokens}): {_TABLE}")
            return table

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            self.disconnect()

    for name, reason in REFUSED_METHODS.items():
        setattr(Remote, name, _refuses(_SAID.get(name, name), reason))
    if hasattr(original, "from_pretrained"):
        Remote.from_pretrained = original.from_pretrained  # loads a whole model on this machine
    Remote.__name__, Remote.__qualname__, Remote.__module__ = (
        original.__name__,
        original.__qualname__,
        original.__module__,
    )
    network.__class__ = Remote


def _refuses(what: str, reason: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"{what}: {reason}")

    return method


def stand_in(module: Any, forward: Callable[..., Any]) -> None:
    """Replace the forward of ``module`` by ``forward(module, ...)``; torch.compile does not touch
    it.
    """
    module.forward = torch.compiler.disable(functools.partial(forward, module))
