"""Dropout in a split: drawn by seed, with the rate of torch, the same when a part is repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dlora.split.cloud.dropout import SeededDropout
from kit.queue_cloud import batch, factors, link
from kit.split_faults import assert_equal, cloud_for, small_half, step
from kit.split_steps import loss_of

Folder = Callable[[str, str], Path]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_dropout_is_drawn_anew_each_forward_and_never_in_evaluation(
    model_folder: Folder, family: str, attention: str
) -> None:
    half = small_half(model_folder, family, **{"train.model_dropout": 0.3})
    cloud = cloud_for(half)
    body = cloud.body
    for network in (body.network, body._training):
        network.set_attn_implementation(attention)
    try:
        link(half, cloud, 2)
        half.model.use(factors(half.model))
        half.model.network.train()
        one, other = loss_of(half, batch()), loss_of(half, batch())
        assert one.item() != other.item()
        assert_equal(step(half, seed=3), step(half, seed=3))
        assert not torch.equal(step(half, seed=3)[0], step(half, seed=4)[0])
        assert step(half, seed=3)[0].isfinite().all()
        half.model.network.eval()
        assert loss_of(half, batch()).item() == loss_of(half, batch()).item()
    finally:
        for network in (body.network, body._training):
            network.set_attn_implementation("sdpa")


def test_seeded_dropout_has_torchs_rate_and_mean() -> None:
    x = torch.ones(200, 200)
    with SeededDropout(torch.Generator().manual_seed(0), None):
        dropped = F.dropout(x, 0.3)
        assert torch.equal(F.dropout(x, 0.3, training=False), x)
    assert abs((dropped == 0).float().mean() - 0.3) < 0.01 and abs(dropped.mean() - 1) < 0.02
    with SeededDropout(torch.Generator().manual_seed(0), 0.5):
        # the device's rate, not the model's
        assert abs((torch.nn.Dropout(0.1)(x) == 0).float().mean() - 0.5) < 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_seeded_attention_is_torchs(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    seen = torch.rand(2, 1, 5, 5, generator=generator) > 0.4
    seen[..., 0] = True
    arguments: dict[str, Any] = {"is_causal": True} if causal else {"attn_mask": seen}
    plain = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **arguments)
    with SeededDropout(torch.Generator().manual_seed(0), None):
        torch.testing.assert_close(
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **arguments), plain
        )
        draws = [
            F.scaled_dot_product_attention(
                query, key, value, enable_gqa=True, dropout_p=0.3, **arguments
            )
            for _ in range(2000)
        ]
    mean = torch.stack(draws).mean(0)
    assert not torch.equal(draws[0], draws[1]) and (mean - plain).abs().max() < 0.15
    blind = torch.zeros(2, 1, 5, 5, dtype=torch.bool)  # padding on the left sees nothing at all
    with SeededDropout(torch.Generator().manual_seed(0), None):
        assert (
            F.scaled_dot_product_attention(query, key, value, attn_mask=blind, enable_gqa=True)
            .isfinite()
            .all()
        )
