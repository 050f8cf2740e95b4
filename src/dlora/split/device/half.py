"""The device's half of a model: head and factors are here, the body runs in the cloud."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from dlora.config.run import Config
from dlora.config.tasks import TASKS
from dlora.errors import ModelError
from dlora.lora.adapt import adapt
from dlora.lora.core import Directions
from dlora.lora.factors import target_ranks
from dlora.lora.layers import StackedLinear
from dlora.lora.units import adapted_units, bottleneck_units, core_units, find_units
from dlora.model.files import read_config
from dlora.model.fingerprints import fingerprint
from dlora.model.layers import LINEAR
from dlora.model.load import FrozenModel, MeanPooledClassifier, load_model
from dlora.split.agreement import Agreement, body_facts, directions_digest, proposal_text
from dlora.split.device.adapter import Adapter
from dlora.split.device.body import RemoteBody, hidden_width
from dlora.split.device.calls import Calls
from dlora.split.device.head import head_reads
from dlora.split.device.model import SplitModel
from dlora.split.device.step import Channel
from dlora.split.device.transformers_class import as_remote, stand_in
from dlora.wire.split.frames import Opened


@dataclass
class Half:
    """The device's half: token embedding, head and factors, and no weights of the body.

    ``model`` is what the local steps train, with one participant (P = 1). ``fingerprint`` hashes
    the frozen weights that are here.
    """

    model: SplitModel
    agreement: Agreement
    facts: dict[str, Any]
    fingerprint: str

    def link(
        self, dial: Callable[[], Channel], pipeline: int, wait: Callable[[float], None]
    ) -> Calls:
        """Send forwards and backwards through the cloud that ``dial`` reaches, from now on.

        ``pipeline``: the number of parts a batch is cut into. ``wait``: sleeps for some seconds.
        """
        prefix = self.model.body.prefix
        layers = {
            name: self.model.network.get_submodule(prefix + name)
            for unit in self.agreement.units
            for name in unit.modules
        }
        manifest = proposal_text(self.facts, self.agreement)
        adapter = Adapter(self.agreement, layers)
        self.model.body.calls = Calls(
            dial, manifest, adapter, hidden_width(self.model.body.config), pipeline, wait
        )
        return self.model.body.calls

    def open(self) -> Opened:
        """Reach the cloud now instead of at the first forward; returns what it takes of one device.

        Raises CloudError if the cloud refuses.
        """
        assert self.model.body.calls is not None
        return self.model.body.calls.open()


def load_half(
    config: Config,
    tokenizer: Any,
    label_names: Sequence[str] | None,
    directions: Directions | None = None,
) -> Half:
    """Read token embedding and head, and draw the factors as PEFT draws them for the whole model.

    ``directions``: under placement core, A and B of each module. Raises ModelError if the model
    cannot be split.
    """
    frozen = load_model(config, tokenizer, label_names, blocks=False)
    weights_hash = fingerprint(frozen.network, but=frozen.head)
    small, mean = frozen.network, isinstance(frozen.network, MeanPooledClassifier)
    small_body = small.body if mean else small.base_model
    prefix = f"{small.base_model_prefix}."
    if any(name.startswith(prefix) for name in frozen.head):
        raise ModelError(
            f"model {config.model}: its folder has no weights for {frozen.head[0]}, which would be"
            " trained in the cloud; take pooling: mean"
        )
    model_config = _whole_config(small_body.config, frozen.source)
    with torch.device("meta"):
        network: Any = (
            MeanPooledClassifier(type(small_body)(model_config))
            if mean
            else type(small)(model_config)
        )
    body = network.body if mean else network.base_model
    units = find_units(no_init_weights()(lambda: type(small_body)(model_config)))
    embedding = small_body.get_input_embeddings()
    body.set_input_embeddings(embedding)
    for name, child in small.named_children():
        if f"{name}." != prefix:
            setattr(network, name, child)
    counts_ids = any(
        name.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None
        for name, layer in body.named_modules()
    )
    dropout = config.train.model_dropout
    remote = RemoteBody(
        model_config, embedding, prefix, "all", dropout != 0.0 or config.lora.lora_dropout > 0
    )
    remote.counts_ids = counts_ids
    for module in _stubs(body, embedding):
        stand_in(module, remote.forward)
    if TASKS[config.task].has_head and not mean:
        remote.reads = head_reads(network, _stubs(body, embedding))
    # PEFT puts factors on the device of the weight, and would draw none on the meta device
    for layer in body.modules():
        if isinstance(layer, LINEAR):
            layer.weight = nn.Parameter(
                torch.zeros(1, 1).expand(layer.weight.shape), requires_grad=False
            )
    whole = FrozenModel(network, frozen.source, frozen.head)
    stacked = adapt(whole, config, directions, weights_here=False)
    model = SplitModel(**vars(stacked), body=remote)
    _empty(body, embedding)
    targets = target_ranks(model.initial)
    outside = [name for name in targets if not name.startswith(prefix)]
    if outside:
        raise ModelError(
            f"{'lora' if config.bottleneck is None else 'bottleneck'}.target_modules:"
            f" {outside[0]} is not in the body; only what runs in the cloud is adapted"
        )
    assert config.split is not None
    activation = None if config.bottleneck is None else config.bottleneck.activation
    of_units = adapted_units if activation is None else bottleneck_units
    ranks = {name.removeprefix(prefix): r for name, r in targets.items()}
    active = of_units(units, ranks)
    of_frame = None
    if config.lora.placement == "core":
        within = {name.removeprefix(prefix): tensor for name, tensor in model.directions.items()}
        of_frame = directions_digest(within, [*ranks])
        active = core_units(active)
    remote.dropouts = [
        (layer, layer.p) for layer in body.modules() if isinstance(layer, nn.Dropout)
    ]
    as_remote(network, model)
    facts = body_facts(model_config, embedding)
    agreement = Agreement(active, config.split.wire, dropout, of_frame, activation)
    return Half(model, agreement, facts, weights_hash)


def _whole_config(small: Any, source: str) -> Any:
    """The config of the whole model: ``small`` with all its transformer blocks."""
    whole, own = copy.deepcopy(small), read_config(source)
    if getattr(own, "layer_types", None) is not None:
        whole.layer_types = own.layer_types
    whole.num_hidden_layers = own.num_hidden_layers
    whole.use_cache = False
    return whole


def _stubs(body: Any, embedding: nn.Module) -> list[Any]:
    """The body, and the models inside it that a head calls as its body (OPT's decoder).

    They are the models on the path from the body to the token embedding.
    """
    [path] = [name for name, module in body.named_modules() if module is embedding]
    parts = path.split(".")
    modules = [body.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    return [module for module in modules if isinstance(module, transformers.PreTrainedModel)]


def _empty(body: Any, embedding: nn.Module) -> None:
    """Remove the tensors that have no values, so that moving and saving the network does not meet
    them.
    """
    for module in body.modules():
        if module is embedding:
            continue
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and (tensor.is_meta or set(tensor.stride()) == {0}):
                    tensors[name] = None
                    # prints nothing; most layers would print the shape of a weight that is gone
                    module.extra_repr = str


def as_ordinary(half: Half) -> Any:
    """The network with factors and head as its own parameters, as any torch program expects."""
    network, model = half.model.network, half.model
    for name, initial in model.initial.items():
        module, _, attribute = name.rpartition(".")
        layer = network.get_submodule(module)
        if isinstance(layer, StackedLinear):
            layer = nn.Linear(1, 1, bias=f"{module}.bias" in model.initial)
            parent, _, child = module.rpartition(".")
            setattr(network.get_submodule(parent), child, layer)
        value = initial.to(model.device, copy=True)
        setattr(layer, attribute, nn.Parameter(value, requires_grad=name not in model.frozen_head))
    # a Trainer then writes only the trained tensors
    network._keys_to_ignore_on_save = sorted(network.state_dict().keys() - model.initial.keys())
    return network.eval()  # from_pretrained returns a model in eval mode too
