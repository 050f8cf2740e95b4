"""What replaces the body on the device: forward and backward through the cloud."""

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

Reads = Literal["pooled", "first", "last", "all"]  # which hidden states the head reads


class RemoteBody:
    """Replaces the body's forward on the device.

    ``prefix``: the body's module names in the whole network begin with it. ``reads``: what the head
    reads.
    """

    def __init__(self, config: Any, embedding: Any, prefix: str, reads: Reads, drops: bool) -> None:
        self.config, self.embedding, self.prefix, self.reads = config, embedding, prefix, reads
        self.drops = drops  # whether a training forward draws dropout, here or in the cloud
        self.attention = config._attn_implementation
        # the body's dropout layers, with the rates that they had when the model was made
        self.dropouts: list[tuple[nn.Dropout, float]] = []
        self.calls: Calls | None = None
        # (B, L) bool for the current forward; None: all tokens
        self.loss_positions: Tensor | None = None
        # value of hidden states that the cloud did not send, for the current forward
        self.unread = 0.0
        self.killed: frozenset[int] = frozenset()  # numbers of the units that nobody trains now

    def forward(
        self, stub: Any, *args: Any, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Run the body in the cloud, with the inputs and outputs of ``stub``, a transformers body.

        Raises ConfigError for an input that the cloud cannot use, and CloudError if the cloud
        fails.
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
            # heads find the pooled output by its index, so the first output must be there
            unread = rows.new_zeros(()).expand(*shape, rows.shape[1])
            return BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=unread, pooler_output=rows
            )
        hidden = rows.new_full((*shape, rows.shape[1]), self.unread)
        hidden = hidden.index_put((needed.to(rows.device),), rows)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """Embed the ids: (B, L) -> (B, L, E). Raises ConfigError for an id that is not in the
        model.
        """
        least, most, rows = int(input_ids.min()), int(input_ids.max()), len(self.embedding.weight)
        if input_ids.dim() != 2 or not 0 <= least <= most < rows:
            raise ConfigError(
                f"input_ids of shape {tuple(input_ids.shape)} go from {least} to {most}; the model"
                f" has {rows} tokens: take its own tokenizer"
            )
        embedded: Tensor = self.embedding(input_ids)
        return embedded

    def _check_body(self, stub: Any, factors: Sequence[Tensor]) -> None:
        """Raise ConfigError if the program changed something that the cloud would not know of."""
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
        """The tokens whose final hidden states the head reads, (B, L) bool; None: the pooled
        output.

        Raises ConfigError if the head would read padding.
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
            read = _rightmost(real)  # heads find the last token by its id and not by the mask
            if (read & ~mask).any():
                raise ConfigError(
                    "attention_mask: this head reads the last token that is no pad by its id, or"
                    " without input_ids the last place, and the mask says padding there; pad with"
                    f" the id {padding}"
                )
            needed = _rightmost(mask) | read
        # every row needs at least one hidden state
        return torch.where(needed.any(dim=1, keepdim=True), needed, _rightmost(mask))

    def positions(self, input_ids: Tensor, mask: Tensor) -> Tensor | None:
        """Positions (B, L) for a body that counts them from the ids (RoBERTa).

        None if the body does not, or if it would count the same positions from the mask.
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
    """The cloud as one torch function: embedded tokens in, what the head reads out.

    Backward returns the gradients of the factors.
    """

    @staticmethod
    def forward(ctx: Any, calls: Calls, request: Request, keep: bool, *factors: Tensor) -> Tensor:
        sent, hidden = calls.forward(request, keep)
        # with saved tensors, torch refuses a second backward and factors that changed after the
        # forward
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
    """Holds a call open as long as its graph exists.

    When the program deletes a loss without a backward, the cloud's memory for the call is freed.
    """

    def __init__(self, calls: Calls, sent: Sent) -> None:
        self.calls, self.sent = calls, sent

    def __del__(self) -> None:
        # at the end of the process the link may be closed already
        with contextlib.suppress(Exception):
            self.calls.drop(self.sent)


def hidden_width(config: Any) -> int:
    """The width of the body's output.

    Some OPT models project their output back to the width of the token embedding.
    """
    width: int = getattr(config, "word_embed_proj_dim", config.hidden_size)
    return width


def _rightmost(flags: Tensor) -> Tensor:
    """(B, L) bool -> the same shape, with only the last True of each row."""
    return flags & (flags.long().flip(1).cumsum(1).flip(1) == 1)
