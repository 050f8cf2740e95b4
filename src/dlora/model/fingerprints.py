"""Hashes that say whether two participants have the same model and the same tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def fingerprint(network: nn.Module, but: Sequence[str] = ()) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the frozen weights.

    The modules named in ``but`` are left out.
    """
    digest = hashlib.sha256()
    outside = tuple(f"{name}." for name in but)
    for name, tensor in sorted(network.state_dict().items()):
        if isinstance(tensor, torch.Tensor) and not (outside and name.startswith(outside)):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over the tokenizer's vocabulary, its fast pipeline and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = (
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    )
    return hashlib.sha256(f"{pipeline}\n{tokenizer.chat_template}".encode()).hexdigest()
