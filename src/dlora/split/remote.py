"""A model whose body is elsewhere: loss.backward() just works."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from dlora.config import Config
from dlora.errors import ConfigError, ModelError
from dlora.lora.adapter_io import save_adapter
from dlora.lora.core import Frame
from dlora.lora.factors import target_names
from dlora.lora.groups import active_groups, core_groups, find_groups
from dlora.lora.stacked import StackedLinear, StackedModel, attach
from dlora.model import LINEAR, FrozenModel, MeanPooledClassifier, fingerprint, load_model
from dlora.split.adapter import Adapter
from dlora.split.agreement import Agreement, body_facts, frame_digest, manifest_text
from dlora.split.calls import Calls, Request, Sent
from dlora.split.conversation import Channel
from dlora.split_frames import Opened

Reads = Literal["pooled", "first", "last", "all"]  # of the body's output, by the head


@dataclass
class Half:
    """The device's half: token embedding and head, the factors' places, and no weight of the body.

    ``model`` is what the local steps train (P = 1); ``fingerprint`` hashes the weights that are here.
    """

    model: StackedModel
    agreement: Agreement
    facts: dict[str, Any]
    fingerprint: str
    body: _RemoteBody

    def link(self, dial: Callable[[], Channel], pipeline: int, wait: Callable[[float], None]) -> Calls:
        """From now on forwards and backwards go through the cloud that ``dial`` reaches."""
        prefix = self.body.prefix
        layers = {
            name: self.model.network.get_submodule(prefix + name) for group in self.agreement.groups for name in group.modules
        }
        manifest = manifest_text(self.facts, self.agreement)
        adapter = Adapter(self.agreement.groups, layers, self.agreement.frame is not None)
        self.body.calls = Calls(dial, manifest, adapter, hidden_width(self.body.config), pipeline, wait)
        return self.body.calls

    def open(self) -> Opened:
        """Reach the cloud now instead of at the first forward; what it takes of this device. Raises CloudError if refused."""
        assert self.body.calls is not None
        return self.body.calls.open()


class _RemoteBody:
    """What stands in for the body's forward."""

    def __init__(self, config: Any, embedding: nn.Module, prefix: str, reads: Reads, drops: bool) -> None:
        self.config, self.embedding, self.prefix, self.reads = config, embedding, prefix, reads
        self.drops = drops  # whether a training forward draws dropout, there or here
        self.calls: Calls | None = None
        self.loss_positions: Tensor | None = None  # (B, L) bool of the forward under way; None: all
        self.killed: frozenset[int] = frozenset()  # groups, in the forward under way
        self.network: Any = None  # whose training flag counts

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        **ignored: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As a transformers body; what else heads hand on (num_items_in_batch, return_dict, use_cache) means nothing here."""
        if past_key_values is not None:
            raise ConfigError("the body in the cloud keeps no key-value cache; call generate(..., use_cache=False)")
        if self.calls is None:
            raise ConfigError("this model is not linked to a cloud; make it with dlora.connect")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embedding(input_ids)
        shape = inputs_embeds.shape[:2]
        mask = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
        if mask.shape != shape:
            raise ConfigError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(shape)}: rows, tokens")
        if not mask.any(dim=1).all():
            raise ConfigError("attention_mask leaves a row without any token; remove that row")
        if self.reads in ("first", "pooled") and not mask[:, 0].all():
            raise ConfigError("attention_mask: this head reads the first token, which is padding; pad on the right")
        if token_type_ids is not None and not 0 <= int(token_type_ids.min()) <= int(token_type_ids.max()) < 256:
            raise ConfigError(f"token_type_ids go to {int(token_type_ids.max())}; a split takes 0 to 255")
        positions = None if position_ids is None else position_ids.cpu().expand(shape)
        if positions is None and input_ids is not None:
            positions = self.positions(input_ids.cpu(), mask)
        needed = self.needed(mask, input_ids)
        training = bool(self.network.training)
        factors = self.calls.adapter.factors()
        request = Request(
            inputs_embeds.detach().cpu(),
            mask,
            needed,
            None if token_type_ids is None else token_type_ids.cpu().expand(shape),
            positions,
            int(torch.randint(1 << 62, ())) if training and self.drops else None,
            factors,
            self.killed,
        )
        keep = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
        rows = _Through.apply(self.calls, request, keep, *factors).to(inputs_embeds.device)  # type: ignore[no-untyped-call]
        if needed is None:
            unread = rows.new_zeros(()).expand(*shape, rows.shape[1])  # heads take the pooled output by its place
            return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=unread, pooler_output=rows)
        hidden = rows.new_zeros(*shape, rows.shape[1])
        hidden = hidden.index_put((needed.to(rows.device),), rows)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden)

    def needed(self, mask: Tensor, input_ids: Tensor | None) -> Tensor | None:
        """Whose final hidden states the head reads (B, L); None: the pooled output."""
        if self.reads == "pooled":
            return None
        if self.reads == "all":
            needed = mask if self.loss_positions is None else mask & self.loss_positions.cpu()
        elif self.reads == "first":
            needed = mask & (torch.arange(mask.shape[1]) == 0)
        else:
            needed = _rightmost(mask)
            if input_ids is not None and self.config.pad_token_id is not None:  # as heads look for it: by id, not by mask
                needed = needed | mask & _rightmost(input_ids.cpu() != self.config.pad_token_id)
        return torch.where(needed.any(dim=1, keepdim=True), needed, _rightmost(mask))  # of every row something comes back

    def positions(self, input_ids: Tensor, mask: Tensor) -> Tensor | None:
        """Positions where the body would count them from the ids (RoBERTa), unless they come to the same from the mask."""
        padding = self.config.pad_token_id
        if not self.counts_ids or padding is None:
            return None
        real = (input_ids != padding).long()
        positions = real.cumsum(dim=1) * real + padding
        plain = torch.arange(1, mask.shape[1] + 1) + padding
        return None if (positions == plain)[mask].all() else positions

    counts_ids = False


class _Through(torch.autograd.Function):
    """From the embedded tokens to what the head reads; backward gives the factors' gradients."""

    @staticmethod
    def forward(ctx: Any, calls: Calls, request: Request, keep: bool, *factors: Tensor) -> Tensor:
        sent, hidden = calls.forward(request, keep)
        ctx.save_for_backward(*factors)  # so that torch refuses a second backward, and factors that were changed in between
        ctx.calls, ctx.ticket = calls, _Ticket(calls, sent)
        ctx.shapes = [factor.shape for factor in factors]
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient], _ = gradients, ctx.saved_tensors
        found = ctx.calls.backward(ctx.ticket.sent, gradient.cpu())
        shaped = (None if own is None else own.view(shape) for own, shape in zip(found, ctx.shapes, strict=True))
        return None, None, None, *shaped


class _Ticket:
    """A call that is open as long as its graph is: a loss that is thrown away frees the cloud's memory."""

    def __init__(self, calls: Calls, sent: Sent) -> None:
        self.calls, self.sent = calls, sent

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the process there may be no link to speak over
            self.calls.drop(self.sent)


def load_half(config: Config, tokenizer: Any, label_names: Sequence[str] | None, frame: Frame | None = None) -> Half:
    """Read token embedding and head, draw the factors as PEFT does beside the whole model; ``frame``: of placement core.

    Raises ModelError.
    """
    frozen = load_model(config, tokenizer, label_names, blocks=False)
    weights_hash = fingerprint(frozen.network, but=frozen.head)
    small, mean = frozen.network, isinstance(frozen.network, MeanPooledClassifier)
    small_body = small.body if mean else small.base_model
    prefix = f"{small.base_model_prefix}."
    if any(name.startswith(prefix) for name in frozen.head):
        raise ModelError(
            f"model {config.model}: its folder has no weights for {frozen.head[0]}, which would be trained in the cloud; take"
            " pooling: mean"
        )
    model_config = _whole_config(small_body.config, frozen.source)
    with torch.device("meta"):
        network: Any = MeanPooledClassifier(type(small_body)(model_config)) if mean else type(small)(model_config)
    body = network.body if mean else network.base_model
    groups = find_groups(no_init_weights()(lambda: type(small_body)(model_config)))
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
    remote = _RemoteBody(model_config, embedding, prefix, "all", dropout != 0.0 or config.lora.lora_dropout > 0)
    remote.counts_ids, remote.network = counts_ids, network
    for module in _stubs(body, embedding):
        module.forward = remote
    if config.task == "classification" and not mean:
        remote.reads = _reads(network, _stubs(body, embedding))
    for layer in body.modules():  # PEFT puts factors where the weight is, and draws nothing on the meta device
        if isinstance(layer, LINEAR):
            layer.weight = nn.Parameter(torch.zeros(1, 1).expand(layer.weight.shape), requires_grad=False)
    whole = FrozenModel(network, frozen.source, frozen.head)
    model = attach(whole, config.lora, config.task, config.seed, frame, weights_here=False)
    _empty(body, embedding)
    targets = target_names(model.initial)
    outside = [name for name in targets if not name.startswith(prefix)]
    if outside:
        raise ModelError(f"lora.target_modules: {outside[0]} is not in the body; only what runs in the cloud is adapted")
    assert config.split is not None
    active = active_groups(groups, [name.removeprefix(prefix) for name in targets])
    of_frame = None
    if config.lora.placement == "core":
        within = {name.removeprefix(prefix): tensor for name, tensor in model.frame.items()}
        of_frame = frame_digest(within, [name.removeprefix(prefix) for name in targets])
        active = core_groups(active, config.lora.r)
    model.loss_positions = config.task == "causal-lm"
    _as_remote(network, remote, model)
    facts = body_facts(model_config, embedding)
    agreement = Agreement(active, config.split.wire, dropout, config.lora.r, of_frame)
    return Half(model, agreement, facts, weights_hash, remote)


def _whole_config(small: Any, source: str) -> Any:
    """The configuration with all its blocks again."""
    whole, own = copy.deepcopy(small), transformers.AutoConfig.from_pretrained(source)
    if getattr(own, "layer_types", None) is not None:
        whole.layer_types = own.layer_types
    whole.num_hidden_layers = own.num_hidden_layers
    whole.use_cache = False
    return whole


def _stubs(body: Any, embedding: nn.Module) -> list[Any]:
    """The body, and within it the models that heads call as bodies (OPT's decoder): those on the way to the embedding."""
    [path] = [name for name, module in body.named_modules() if module is embedding]
    parts = path.split(".")
    modules = [body.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    return [module for module in modules if isinstance(module, transformers.PreTrainedModel)]


def hidden_width(config: Any) -> int:
    """Of what the body gives; some OPT models bring it back to the width of their token embedding."""
    width: int = getattr(config, "word_embed_proj_dim", config.hidden_size)
    return width


def _rightmost(flags: Tensor) -> Tensor:
    """(B, L) bool -> only the last True of each row."""
    return flags & (flags.long().flip(1).cumsum(1).flip(1) == 1)


def _reads(network: Any, stubs: Sequence[Any]) -> Reads:
    """What the head reads, found by changing it: one text of three tokens and a pad."""
    config, remote = network.config, stubs[0].forward
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    ids = torch.full((1, 4), (pad + 1) % config.vocab_size)
    ids[0, 3] = pad
    generator = torch.Generator().manual_seed(0)
    device = next(network.get_input_embeddings().parameters()).device
    hidden = torch.randn(1, 4, hidden_width(config), generator=generator).to(device)
    pooled = torch.randn(1, config.hidden_size, generator=generator).to(device)

    @torch.no_grad()
    def logits(changed: int | None = None, pooled: Tensor = pooled) -> Tensor:
        own = hidden.clone()
        if changed is not None:
            own[:, changed] *= -1
        output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=own, pooler_output=pooled)
        for stub in stubs:
            stub.forward = lambda *args, **kwargs: output
        result: Tensor = network(input_ids=ids.to(device), attention_mask=(ids != pad).long().to(device)).logits
        return result

    try:
        network.eval()
        plain = logits()
        read = [place for place in range(4) if not torch.equal(logits(place), plain)]
        if not torch.equal(logits(pooled=-pooled), plain):
            return "pooled" if not read else "all"
        return {(0,): "first", (2,): "last"}.get(tuple(read), "all")  # type: ignore[return-value, arg-type]
    finally:
        for stub in stubs:
            stub.forward = remote


def _empty(body: Any, embedding: nn.Module) -> None:
    """Take away the tensors without numbers, so that moving and saving the network never meets them."""
    for module in body.modules():
        if module is embedding:
            continue
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and (tensor.is_meta or set(tensor.stride()) == {0}):
                    tensors[name] = None


def _as_remote(network: Any, remote: _RemoteBody, model: StackedModel) -> None:
    """Make the network an instance of a subclass of its class, which knows what differs when the body is elsewhere."""
    original = type(network)

    class Remote(original):  # type: ignore[misc, valid-type]
        @functools.wraps(original.forward)
        def forward(self, *args: Any, loss_positions: Tensor | None = None, **kwargs: Any) -> Any:
            labels = kwargs.get("labels")
            if loss_positions is None and model.loss_positions and labels is not None:
                mask = kwargs.get("attention_mask")
                if mask is not None and ((mask == 0) & (labels != -100)).any():
                    raise ConfigError("labels hold targets where attention_mask says padding; set them to -100 there")
                loss_positions = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
            remote.loss_positions, remote.killed = loss_positions, model.killed
            try:
                return original.forward(self, *args, **kwargs)
            finally:
                remote.loss_positions = None

        def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
            """A PEFT folder; the frozen weights are the cloud's."""
            values = {}
            for name, initial in model.initial.items():
                module, _, attribute = name.rpartition(".")
                values[name] = getattr(self.get_submodule(module), attribute).detach().reshape(1, *initial.shape)
            save_adapter(Path(save_directory), values, model.peft_config, model.frame)

        def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
            raise ConfigError("gradient_checkpointing: the body runs in the cloud, which keeps its activations; remove it")

    Remote.__name__, Remote.__qualname__, Remote.__module__ = original.__name__, original.__qualname__, original.__module__
    network.__class__ = Remote


def as_ordinary(half: Half) -> Any:
    """The network with factors and head as parameters of its own, as any torch program expects them."""
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
    return network.eval()  # as from_pretrained gives it
