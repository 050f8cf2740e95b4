"""Rows become batches, and the order in which a peer sees its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dlora.data.formats import IGNORED, Example
from dlora.seeds import derive_seed


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right: ids, mask, type ids (examples, tokens) int64; labels alike, or
    (examples,) int64 or float32, or (examples, classes) float32.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_type_ids: Tensor | None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        tensors = {key: value.to(device) for key, value in vars(self).items() if value is not None}
        return replace(self, **tensors)


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad to the longest on the right: ids with `pad_token_id`, label lists with -100, type ids
    with 0.
    """
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: Sequence[list[int]], filler: int) -> Tensor:
        return torch.tensor(
            [row + [filler] * (longest - len(row)) for row in rows], dtype=torch.int64
        )

    ids = [example.input_ids for example in examples]
    tokens = [example.labels for example in examples if isinstance(example.labels, list)]
    labels = (
        padded(tokens, IGNORED)
        if tokens
        else torch.tensor([example.labels for example in examples])
    )
    types = [example.token_type_ids for example in examples if example.token_type_ids is not None]
    mask = padded([[1] * len(row) for row in ids], 0)
    return Batch(padded(ids, pad_token_id), mask, labels, padded(types, 0) if types else None)


class BatchStream:
    """One peer's endless order of examples: a new permutation for each pass. It depends on (seed,
    name, position) alone.
    """

    def __init__(self, num_examples: int, seed: int, name: str) -> None:
        """The order of `num_examples` (at least 1) for the peer called `name`."""
        assert num_examples > 0
        self.num_examples, self.seed, self.name = num_examples, seed, name
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)  # a cache only

    def take(self, start: int, count: int) -> list[int]:
        """The indices at positions start .. start + count - 1; every pass holds each index once."""
        taken: list[int] = []
        while len(taken) < count:
            which, offset = divmod(start + len(taken), self.num_examples)
            if which != self._pass:
                generator = np.random.default_rng(derive_seed(self.seed, "order", self.name, which))
                self._pass, self._order = which, generator.permutation(self.num_examples)
            taken += self._order[offset : offset + count - len(taken)].tolist()
        return taken
