"""Tensors <-> bytes: safetensors, whose header is JSON and whose payload is numbers. Never pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor


def encode(tensors: Mapping[str, Tensor], wire: torch.dtype) -> bytes:
    """One message: header and payload of one participant's tensors in the wire's dtype."""
    return save({name: tensor.detach().to("cpu", wire).contiguous() for name, tensor in tensors.items()})
