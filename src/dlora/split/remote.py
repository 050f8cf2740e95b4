"""A model whose body is elsewhere: loss.backward() just works."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from dlora.config import Config
from dlora.errors import ConfigError, ModelError
from dlora.lora.core import Frame
from dlora.lora.factors import target_names
from dlora.lora.groups import active_groups, core_groups, find_groups
from dlora.lora.stacked import StackedLinear, StackedModel, attach
from dlora.model import LINEAR, FrozenModel, MeanPooledClassifier, fingerprint, load_model
from dlora.model_files import read_config
from dlora.split.adapter import Adapter
from dlora.split.agreement import Agreement, body_facts, frame_digest, manifest_text
from dlora.split.calls import Calls, Request, Sent
from dlora.split.conversation import Channel
from dlora.split.inputs import by_name, check_names, per_token, real_tokens, several_texts
from dlora.split.ordinary import as_remote, stand_in
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

    def __init__(self, config: Any, embedding: Any, prefix: str, reads: Reads, drops: bool) -> None:
        self.config, self.embedding, self.prefix, self.reads = config, embedding, prefix, reads
        self.drops = drops  # whether a training forward draws dropout, there or here
        self.attention = config._attn_implementation
        self.dropouts: list[tuple[nn.Dropout, float]] = []  # of the body, with the rates that it was made with
        self.calls: Calls | None = None
        self.loss_positions: Tensor | None = None  # (B, L) bool of the forward under way; None: all
        self.unread = 0.0  # what stands in hidden states that did not come, in the forward under way
        self.killed: frozenset[int] = frozenset()  # groups, in the forward under way

    def forward(self, stub: Any, *args: Any, **kwargs: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As ``stub``, a transformers body, takes and gives it; what cannot be so is refused."""
        given = by_name(type(stub).forward, args, kwargs)
        check_names(given, self.config)
        if self.calls is None:
            raise ConfigError("this model is not linked to a cloud; make it with dlora.connect")
        factors = self.calls.adapter.factors()
        self._check_body(stub, factors)
        input_ids: Tensor | None = given.get("input_ids")
        inputs_embeds: Any = given.get("inputs_embeds")
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("a forward takes input_ids or inputs_embeds, and one of them only")
        if input_ids is not None:
            inputs_embeds = self._embedded(input_ids)
        shape = inputs_embeds.shape[:2]
        mask = real_tokens(given.get("attention_mask"), shape)
        token_types = per_token("token_type_ids", given.get("token_type_ids"), shape)
        if token_types is not None and int(token_types.max()) > 255:
            raise ConfigError(f"token_type_ids go to {int(token_types.max())}; a split takes 0 to 255")
        positions = per_token("position_ids", given.get("position_ids"), shape)
        packed = several_texts(given, positions, mask)
        if positions is None and input_ids is not None:
            positions = self.positions(input_ids.cpu(), mask)
        needed = self.needed(mask, input_ids)
        request = Request(
            inputs_embeds.detach().cpu(),
            mask,
            needed,
            token_types,
            positions,
            int(torch.randint(1 << 62, ())) if stub.training and self.drops else None,
            factors,
            self.killed,
            packed,
        )
        keep = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
        rows = _Through.apply(self.calls, request, keep, *factors).to(inputs_embeds.device)  # type: ignore[no-untyped-call]
        if needed is None:
            unread = rows.new_zeros(()).expand(*shape, rows.shape[1])  # heads take the pooled output by its place
            return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=unread, pooler_output=rows)
        hidden = rows.new_full((*shape, rows.shape[1]), self.unread)
        hidden = hidden.index_put((needed.to(rows.device),), rows)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, E)."""
        least, most, rows = int(input_ids.min()), int(input_ids.max()), len(self.embedding.weight)
        if input_ids.dim() != 2 or not 0 <= least <= most < rows:
            raise ConfigError(
                f"input_ids of shape {tuple(input_ids.shape)} go from {least} to {most}; the model has {rows} tokens: take its"
                " own tokenizer"
            )
        embedded: Tensor = self.embedding(input_ids)
        return embedded

    def _check_body(self, stub: Any, factors: Sequence[Tensor]) -> None:
        """Raise ConfigError for what was changed here and has no way to the body in the cloud."""
        if torch.is_grad_enabled() and self.embedding.weight.requires_grad:
            raise ConfigError("the token embedding asks for a gradient, and none comes back: requires_grad_(False) for it")
        if any(factor.dtype != torch.float32 for factor in factors):
            raise ConfigError("the factors are no float32 any more: undo .to(), .half() or bf16_full_eval; bf16=True is fine")
        if any((layer.p, layer.training) != (rate, stub.training) for layer, rate in self.dropouts):
            raise ConfigError(
                "dropout was changed in the body, which draws it in the cloud: give train.model_dropout in the config, and"
                " train() or eval() the whole model"
            )
        if (now := self.config._attn_implementation) != self.attention:
            raise ConfigError(f"attn_implementation {now}: the cloud attends in its own way; take {self.attention} again")

    def needed(self, mask: Tensor, input_ids: Tensor | None) -> Tensor | None:
        """Whose final hidden states the head reads (B, L); None: the pooled output. Raises ConfigError if padding is read."""
        if self.reads in ("first", "pooled") and not mask[:, 0].all():
            raise ConfigError("attention_mask: this head reads the first token, which is padding; pad on the right")
        if self.reads == "pooled":
            return None
        if self.reads == "all":
            needed = mask if self.loss_positions is None else mask & self.loss_positions.cpu()
        elif self.reads == "first":
            needed = mask & (torch.arange(mask.shape[1]) == 0)
        else:
            padding = self.config.pad_token_id
            real = torch.ones_like(mask) if input_ids is None or padding is None else input_ids.cpu() != padding
            read = _rightmost(real)  # as heads look for it: by id, not by mask
            if (read & ~mask).any():
                raise ConfigError(
                    "attention_mask: this head reads the last token that is no pad by its id, or without input_ids the last"
                    f" place, and the mask says padding there; pad with the id {padding}"
                )
            needed = _rightmost(mask) | read
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
    remote.counts_ids = counts_ids
    for module in _stubs(body, embedding):
        stand_in(module, remote.forward)
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
    remote.dropouts = [(layer, layer.p) for layer in body.modules() if isinstance(layer, nn.Dropout)]
    as_remote(network, remote, model)
    facts = body_facts(model_config, embedding)
    agreement = Agreement(active, config.split.wire, dropout, config.lora.r, of_frame)
    return Half(model, agreement, facts, weights_hash, remote)


def _whole_config(small: Any, source: str) -> Any:
    """The configuration with all its blocks again."""
    whole, own = copy.deepcopy(small), read_config(source)
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
    config, remote = network.config, [stub.forward for stub in stubs]
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
        for stub, forward in zip(stubs, remote, strict=True):
            stub.forward = forward


def _empty(body: Any, embedding: nn.Module) -> None:
    """Take away the tensors without numbers, so that moving and saving the network never meets them."""
    for module in body.modules():
        if module is embedding:
            continue
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and (tensor.is_meta or set(tensor.stride()) == {0}):
                    tensors[name] = None
                    module.extra_repr = str  # nothing; most tell the shape of their weight


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
    network._keys_to_ignore_on_save = sorted(network.state_dict().keys() - model.initial.keys())  # for a Trainer
    return network.eval()  # as from_pretrained gives it
