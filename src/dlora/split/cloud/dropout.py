"""Dropout that can be repeated: it draws from its own generator, in one thread only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SeededDropout(TorchFunctionMode):
    """Dropout from its own generator, in this thread only.

    Torch has one generator for all threads, so a part that draws from it cannot be repeated.
    ``rate`` replaces every dropout rate of the model; None: each layer keeps its own.
    """

    def __init__(self, generator: torch.Generator, rate: float | None) -> None:
        super().__init__()
        self.generator, self.rate = generator, rate

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropped(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropped(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        rate = p if self.rate is None else self.rate
        if not training or rate == 0.0:
            return x
        keep = torch.rand(x.shape, generator=self.generator, device=x.device) >= rate
        return x * keep / (1 - rate)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention with dropout, written out: torch's fused version draws from torch's own
        generator.
        """
        if enable_gqa:
            key, value = (
                tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
                for tensor in (key, value)
            )
        scores = (
            query
            @ key.transpose(-2, -1)
            * (scale if scale is not None else query.shape[-1] ** -0.5)
        )
        # not -inf: a row of padding may see no token at all, and its softmax would be NaN
        least = torch.finfo(scores.dtype).min
        if is_causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(ahead, least)
        if attn_mask is not None:
            scores = (
                scores.masked_fill(~attn_mask, least)
                if attn_mask.dtype == torch.bool
                else scores + attn_mask
            )
        return self._dropped(scores.softmax(dim=-1), dropout_p) @ value
