"""What stands on the device in the place of the body: forward and backward through the cloud."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from dlora.errors import ConfigError
from dlora.split.device.calls import Calls, Sent
from dlora.split.device.inputs import by_name, check_names, per_token, real_tokens, several_texts
from dlora.split.device.parts import Request

Reads = Literal["pooled", "first", "last", "all"]  # of the body's output, by the head


class RemoteBody:
    """What stands in for the body's forward."""

    def __init__(self, config: Any, embedding: Any, prefix: str, reads: Reads, drops: bool) -> None:
        self.config, self.embedding, self.prefix, self.reads = config, embedding, prefix, reads
        self.drops = drops  # whether a training forward draws dropout, there or here
        self.attention = config._attn_implementation
        # of the body, with the rates that it was made with
        self.dropouts: list[tuple[nn.Dropout, float]] = []
        self.calls: Calls | None = None
        self.loss_positions: Tensor | None = None  # (B, L) bool of the forward under way; None: all
        # what stands in hidden states that did not come, in the forward under way
        self.unread = 0.0
        self.killed: frozenset[int] = frozenset()  # groups, in the forward under way

    def forward(
        self, stub: Any, *args: Any, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Take inputs and give outputs as ``stub``, a transformers body, does; inputs that a cloud
        cannot use are refused.
        """
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
            raise ConfigError(
                f"token_type_ids go to {int(token_types.max())}; a split takes 0 to 255"
            )
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
            # heads take the pooled output by its place
            unread = rows.new_zeros(()).expand(*shape, rows.shape[1])
            return BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=unread, pooler_output=rows
            )
        hidden = rows.new_full((*shape, rows.shape[1]), self.unread)
        hidden = hidden.index_put((needed.to(rows.device),), rows)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, E)."""
        least, most, rows = int(input_ids.min()), int(input_ids.max()), len(self.embedding.weight)
        if input_ids.dim() != 2 or not 0 <= least <= most < rows:
            raise ConfigError(
                f"input_ids of shape {tuple(input_ids.shape)} go from {least} to {most}; the model"
                f" has {rows} tokens: take its own tokenizer"
            )
        embedded: Tensor = self.embedding(input_ids)
        return embedded

    def _check_body(self, stub: Any, factors: Sequence[Tensor]) -> None:
        """Raise ConfigError for what was changed here and has no way to the body in the cloud."""
        if torch.is_grad_enabled() and self.embedding.weight.requires_grad:
            raise ConfigError(
                "the token embedding asks for a gradient, and none comes back:"
                " requires_grad_(False) for it"
            )
        if any(factor.dtype != torch.float32 for factor in factors):
            raise ConfigError(
                "the factors are no float32 any more: undo .to(), .half() or bf16_full_eval;"
                " bf16=True is fine"
            )
        if any((layer.p, layer.training) != (rate, stub.training) for layer, rate in self.dropouts):
            raise ConfigError(
                "dropout was changed in the body, which draws it in the cloud: give"
                " train.model_dropout in the config, and train() or eval() the whole model"
            )
        if (now := self.config._attn_implementation) != self.attention:
            raise ConfigError(
                f"attn_implementation {now}: the cloud attends in its own way; take"
                f" {self.attention} again"
            )

    def needed(self, mask: Tensor, input_ids: Tensor | None) -> Tensor | None:
        """Whose final hidden states the head reads (B, L); None: the pooled output. Raises
        ConfigError if padding is read.
        """
        if self.reads in ("first", "pooled") and not mask[:, 0].all():
            raise ConfigError(
                "attention_mask: this head reads the first token, which is padding; pad on the"
                " right"
            )
        if self.reads == "pooled":
            return None
        if self.reads == "all":
            needed = mask if self.loss_positions is None else mask & self.loss_positions.cpu()
        elif self.reads == "first":
            needed = mask & (torch.arange(mask.shape[1]) == 0)
        else:
            padding = self.config.pad_token_id
            real = (
                torch.ones_like(mask)
                if input_ids is None or padding is None
                else input_ids.cpu() != padding
            )
            read = _rightmost(real)  # as heads look for it: by id, not by mask
            if (read & ~mask).any():
                raise ConfigError(
                    "attention_mask: this head reads the last token that is no pad by its id, or"
                    " without input_ids the last place, and the mask says padding there; pad with"
                    f" the id {padding}"
                )
            needed = _rightmost(mask) | read
        # of every row something comes back
        return torch.where(needed.any(dim=1, keepdim=True), needed, _rightmost(mask))

    def positions(self, input_ids: Tensor, mask: Tensor) -> Tensor | None:
        """Positions where the body would count them from the ids (RoBERTa), unless they come to the
        same from the mask.
        """
        padding = self.config.pad_token_id
        if not self.counts_ids or padding is None:
            return None
        real = (input_ids != padding).long()
        positions = real.cumsum(dim=1) * real + padding
        plain = torch.arange(1, mask.shape[1] + 1) + padding
        return None if (positions == plain)[mask].all() else positions

    counts_ids = False


class _Through(torch.autograd.Function):
    """The way through the cloud: embedded tokens go in, what the head reads comes out, and backward
    gives the factors' gradients.
    """

    @staticmethod
    def forward(ctx: Any, calls: Calls, request: Request, keep: bool, *factors: Tensor) -> Tensor:
        sent, hidden = calls.forward(request, keep)
        # so that torch refuses a second backward, and factors that were changed in between
        ctx.save_for_backward(*factors)
        ctx.calls, ctx.ticket = calls, _Ticket(calls, sent)
        ctx.shapes = [factor.shape for factor in factors]
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient], _ = gradients, ctx.saved_tensors
        found = ctx.calls.backward(ctx.ticket.sent, gradient.cpu())
        shaped = (
            None if own is None else own.view(shape)
            for own, shape in zip(found, ctx.shapes, strict=True)
        )
        return None, None, None, *shaped


class _Ticket:
    """A call that is open as long as its graph is: a loss that is thrown away frees the cloud's
    memory.
    """

    def __init__(self, calls: Calls, sent: Sent) -> None:
        self.calls, self.sent = calls, sent

    def __del__(self) -> None:
        # at the end of the process there may be no link to speak over
        with contextlib.suppress(Exception):
            self.calls.drop(self.sent)


def hidden_width(config: Any) -> int:
    """The width of what the body gives; some OPT models bring it back to the width of their token
    embedding.
    """
    width: int = getattr(config, "word_embed_proj_dim", config.hidden_size)
    return width


def _rightmost(flags: Tensor) -> Tensor:
    """(B, L) bool -> only the last True of each row."""
    return flags & (flags.long().flip(1).cumsum(1).flip(1) == 1)
