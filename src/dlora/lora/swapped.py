"""Adapters of PEFT that several participants cannot train at once: each participant in its turn is
bound to the one model.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# These come before peft: they silence the messages that peft's imports print.
from dlora.lora.stacked import StackedModel, lora_config
from dlora.model.load import FrozenModel
from dlora.model.quiet import quietly, without_bitsandbytes

# isort: split
import torch

with without_bitsandbytes():
    import peft
from safetensors.torch import load_file
from torch import Tensor, nn

from dlora.config.run import Config
from dlora.config.tasks import TASKS
from dlora.config.training import only_biases
from dlora.errors import ModelError
from dlora.lora.factors import Factors
from dlora.lora.targets import find_saved, find_targets, short_names


class _Bound(nn.Module):
    """A model of PEFT whose trained parameters are those of one participant, without a copy."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.get_base_model().config
        self.base_model_prefix = getattr(model.get_base_model(), "base_model_prefix", "")
        self.bound: dict[str, Tensor] = {}

    def forward(self, input_ids: Tensor, **arguments: Any) -> Any:
        """As the model's; positions of virtual tokens, which come first, have no logits."""
        result = torch.func.functional_call(
            self.model, self.bound, kwargs={"input_ids": input_ids, **arguments}, strict=False
        )
        if result.logits.dim() == 3:
            result.logits = result.logits[:, -input_ids.shape[1] :]
        return result


@dataclass
class SwappedModel(StackedModel):
    """A model with adapters that cannot be stacked; `use` takes one participant.

    Names are those of PEFT's parameters. ``reason``: why they are not stacked.
    """

    reason: str = ""

    @property
    def peft_model(self) -> Any:
        """PEFT's model; its own trained parameters hold no participant."""
        return self.network.model

    def use(self, factors: Mapping[str, Tensor], killed: frozenset[int] = frozenset()) -> None:
        """Bind the model to these (1, ...) tensors until the next call. Nothing is copied."""
        self.network.bound = {name: tensor[0] for name, tensor in factors.items()}

    def state(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of PEFT's file for one participant's ``factors``, (1, ...) each."""
        own = dict(self.peft_model.named_parameters())
        with torch.no_grad():
            for name, tensor in factors.items():
                own[name].copy_(tensor[0])
        state: dict[str, Tensor] = peft.get_peft_model_state_dict(self.peft_model)
        return {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in state.items()
            # with bias all, PEFT names the biases of its own copies of the head once more
            if not {"original_module", "modules_to_save"} & set(name.split("."))
        }

    def factors_of(self, file: Path) -> Factors:
        """One participant's factors out of PEFT's file. Raises OSError or SafetensorError when it
        cannot be read, ModelError when it holds other tensors.
        """
        stored = load_file(file)
        expected = self.state({name: tensor[None] for name, tensor in self.initial.items()})
        shapes, as_expected = (
            {name: tuple(tensor.shape) for name, tensor in of.items()} for of in (stored, expected)
        )
        if shapes != as_expected:
            raise ModelError(f"adapter {file.parent}: its tensors are not those of this run")
        peft.set_peft_model_state_dict(self.peft_model, stored)
        own = dict(self.peft_model.named_parameters())
        return {name: own[name].detach().clone()[None] for name in self.initial}


def swap(frozen: FrozenModel, config: Config, reason: str) -> SwappedModel:
    """The model with the adapters of the config's block peft, or of lora with modules_to_save.

    Raises ModelError when PEFT cannot make them, or when a target matches nothing.
    """
    try:
        section = _section(frozen, config)
        if config.pooling == "mean" and section.is_prompt_learning:
            raise ModelError(
                f"peft: {config.peft and config.peft['peft_type']} puts virtual tokens before the"
                " text, and pooling mean has no place for them; remove pooling"
            )
        if config.pooling == "mean":
            # PEFT knows the heads of transformers' classifiers, and this one is dlora's own
            section.task_type = None
            section.modules_to_save = [*(section.modules_to_save or ()), *frozen.head]
        with torch.random.fork_rng(devices=[]), quietly(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated")
            torch.manual_seed(config.seed)
            model = peft.get_peft_model(frozen.network, section)
    # PEFT checks little: a wrong value shows as any of these, deep inside
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "lora" if config.peft is None else "peft"
        raise ModelError(f"{what}: PEFT cannot make this adapter ({line[:300]})") from error
    initial = {
        name: parameter.detach().float().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".original_module." not in name
    }
    if config.peft is not None and only_biases(config.peft):
        initial = {name: tensor for name, tensor in initial.items() if ".lora_" not in name}
    if not initial:
        raise ModelError("peft: nothing trains here; see target_modules")
    heads = frozenset(
        name for name in initial if any(f".{head}.modules_to_save." in name for head in frozen.head)
    )
    model.requires_grad_(False)
    section = model.peft_config["default"]
    section.base_model_name_or_path, section.inference_mode = frozen.source, True
    return SwappedModel(
        network=_Bound(model),
        task=TASKS[config.task],
        initial=initial,
        frozen_head=frozenset() if config.lora.train_head else heads,
        peft_config=section,
        reason=reason,
    )


def _section(frozen: FrozenModel, config: Config) -> peft.PeftConfig:
    """PEFT's config of the adapters."""
    if config.peft is None:
        targets = find_targets(frozen.network, config.lora, frozen.head)
        section = lora_config(frozen.network, config.lora, config.task, targets)
        section.modules_to_save = find_saved(frozen.network, config.lora, frozen.head, targets)
        section.target_modules = short_names(frozen.network, targets)
        return section
    given = {"task_type": TASKS[config.task].peft, **config.peft}
    if not only_biases(config.peft):
        _check_words(config.peft)
    else:
        # PEFT loads biases with a LoRA only: here of rank 1, with a B that stays zero
        first = find_targets(frozen.network, config.lora, frozen.head)[0]
        given |= {"peft_type": "LORA", "r": 1, "target_modules": [first]}
    return peft.get_peft_config(given)


def _check_words(given: Mapping[str, Any]) -> None:
    """Raise ModelError if PEFT has no such kind of adapter, or the kind no such key."""
    kinds = {kind.value: config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(given["peft_type"])
    if kind not in kinds:
        raise ModelError(
            f"peft: {kind} is no peft_type of PEFT {peft.__version__}"
            f"{_meant(kind, sorted(kinds))}; it has {', '.join(sorted(kinds))}"
        )
    keys = [field.name for field in fields(kinds[kind])]
    for key in given:
        if key not in keys:
            raise ModelError(f"peft: {key} is no key of {kind}{_meant(key, keys)}")


def _meant(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
