"""Which hidden states a model's head reads; found by changing them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from dlora.split.device.body import Reads, hidden_width


def head_reads(network: Any, stubs: Sequence[Any]) -> Reads:
    """Which hidden states the head reads.

    The head computes the logits of one text of three tokens and a pad, and again with each hidden
    state changed. A changed logit shows that the head reads that state.
    """
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
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=own, pooler_output=pooled
        )
        for stub in stubs:
            stub.forward = lambda *args, **kwargs: output
        result: Tensor = network(
            input_ids=ids.to(device), attention_mask=(ids != pad).long().to(device)
        ).logits
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
