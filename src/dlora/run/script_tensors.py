"""The tensors that a training script trains, by name: what is mixed, and where it goes back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dlora.decentralized.mixing import Factor, Rule
from dlora.errors import ConfigError
from dlora.lora.factors import Factors, digest

# what wrappers of torch put into the names of parameters
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.[^.]+)?(?:\.weight)?$")


class ScriptTensors:
    """Every parameter of ``model`` that requires a gradient, or the tensors of a mapping.

    Names are those of `Module.named_parameters` without the parts that torch's wrappers add. Raises
    ConfigError if there is nothing to mix.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        if not isinstance(model, nn.Module | Mapping):
            raise ConfigError(
                "joined takes a module, or a mapping from names to tensors, and got a"
                f" {type(model).__name__}"
            )
        named = dict(model.named_parameters() if isinstance(model, nn.Module) else model.items())
        if isinstance(model, nn.parallel.DistributedDataParallel):
            named = {name.removeprefix("module."): tensor for name, tensor in named.items()}
        named = {_WRAPPERS.sub("", name): tensor for name, tensor in named.items()}
        self.tensors = {
            name: tensor for name, tensor in sorted(named.items()) if tensor.requires_grad
        }
        self.frozen = {name: named[name] for name in sorted(named.keys() - self.tensors.keys())}
        if not self.tensors:
            raise ConfigError(
                "nothing to mix: no tensor requires a gradient; add the adapter to the model before"
                " `joined`, or call requires_grad_() on what trains"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def taken(self) -> Factors:
        """A copy of each tensor, (1, ...), on the CPU; float32, or float64 where it is float64."""
        return {name: _on_cpu(tensor).clone().unsqueeze(0) for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def give(self, taken: Factors, mixed: Factors) -> None:
        """Add to each tensor what mixing has changed since it was ``taken``, in place.

        A tensor that has not changed since then becomes exactly ``mixed``, rounded to its dtype.
        """
        for name, tensor in self.tensors.items():
            _set(tensor, (_on_cpu(tensor) - taken[name][0]).add_(mixed[name][0]))

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set each tensor to a value, in place. Raises ConfigError if one has no value."""
        if missing := [name for name in self.tensors if name not in values]:
            raise ConfigError(
                f"holding needs a value for each tensor that is mixed, and has none for"
                f" {missing[0]}; give what `average` returned"
            )
        for name, tensor in self.tensors.items():
            _set(tensor, values[name])

    def train_only(self, names: frozenset[str]) -> None:
        """Ask for gradients of ``names`` only; the others take no step in this round."""
        for name, tensor in self.tensors.items():
            if tensor.requires_grad != (name in names):
                tensor.requires_grad_(name in names)
                tensor.grad = None

    def fingerprint(self) -> str | None:
        """SHA-256 over the frozen parameters; None if there are none.

        Buffers are left out, because some change while a model trains.
        """
        if not self.frozen:
            return None
        sha = hashlib.sha256()
        for name, tensor in self.frozen.items():  # one at a time: shards are gathered
            sha.update(digest({name: _whole(tensor)}).encode())
        return sha.hexdigest()


@dataclass(frozen=True)
class AdapterRule:
    """A rule for A and B, for tensors with the names that PEFT gives them."""

    rule: Rule

    def trains(self, name: str, round: int) -> bool:
        """See `Rule.trains`."""
        return self.rule.trains(_FACTOR.sub(r".lora_\1", name), round)

    def sends(self, name: str, round: int) -> bool:
        """See `Rule.sends`."""
        return self.rule.sends(_FACTOR.sub(r".lora_\1", name), round)


def rule_for(rule: Rule, word: str, tensors: ScriptTensors, several: bool) -> Rule:
    """The rule for these tensors.

    ``word``: its name in the config. ``several``: the site has several processes. Raises
    ConfigError if the rule speaks of A and B, and the tensors are none, or the processes cannot
    follow it.
    """
    if isinstance(rule, Factor):
        return rule
    if several:
        raise ConfigError(
            f"rule {word} lets some tensors rest, and a site with several processes expects a"
            " gradient of each; take rule factor"
        )
    kinds = {match[1] for name in tensors.tensors if (match := _FACTOR.search(name))}
    if kinds != {"A", "B"}:
        raise ConfigError(
            f"rule {word} chooses between LoRA's A and B, and what trains here is"
            f" {', '.join([*tensors.tensors][:3])}; take rule factor, which mixes any tensor"
        )
    return AdapterRule(rule)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor; of a sharded one (FSDP) all shards, for which every rank must call this."""
    whole: Tensor = cast(Any, tensor).full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


def _on_cpu(tensor: Tensor) -> Tensor:
    return _whole(tensor).to("cpu", torch.promote_types(tensor.dtype, torch.float32))


def _set(tensor: Tensor, value: Tensor) -> None:
    """Set a tensor, or this rank's shard of it, to the whole ``value``, in place."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(
            value.to(tensor.device, tensor.dtype),
            tensor.device_mesh,
            tensor.placements,
            src_data_rank=None,
        )
    tensor.copy_(value)
