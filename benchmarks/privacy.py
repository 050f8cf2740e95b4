"""What a curious cloud reads in the frames of a session: the texts, the labels, the adapter; and what bfloat16 and int8 hide.

    DLORA_ASSETS=... python benchmarks/privacy.py        # or --classes FILE --language-model FOLDER --texts FILE

The attacker follows the protocol, knows the public model and keeps the frames. ``docs/privacy.md`` explains the tables.
"""

from __future__ import annotations

import argparse
import math
import os
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from stacked_step import machine_facts, table
from torch import Tensor

from dlora.config import CloudConfig, Config
from dlora.data import Batch, collate, encode_evaluation
from dlora.model import load_model, load_tokenizer
from dlora.net.split_codec import decode_split, encode_split
from dlora.split.body import Body, load_body
from dlora.split.conversation import bits
from dlora.split.remote import Half, load_half
from dlora.split.session import Budget, Limits, Session
from dlora.split_frames import WIRES, Begin, SplitFrame, Values, Wire
from dlora.train import Participants, forward, local_steps

ROWS, STEPS, SECRET_SEED, SEEDS_TRIED = 32, 40, 4711, 20
PATIENCE_S = 120.0  # for a frame that must come


# What the attacker has


@dataclass
class Part:
    """One part's way through the body, as the cloud sees it; ``inputs`` and ``updates`` by group."""

    begin: Begin
    inputs: dict[int, Tensor] = field(default_factory=dict)  # (N, I)
    updates: dict[int, Tensor] = field(default_factory=dict)  # (N, sum of O)
    hidden: Tensor | None = None
    gradient: Tensor | None = None  # of the loss by hidden; None: no training

    def row_means(self, of: Tensor) -> Tensor:
        """(N, width) -> (rows, width), for a head that reads the mean over a text's tokens."""
        mask = bits(self.begin.mask, self.begin.rows * self.begin.columns).reshape(self.begin.rows, -1)
        return torch.stack([own.mean(0) for own in of.split(mask.sum(1).tolist())])


class Tap:
    """A link over which frames become bytes and are read again, and the cloud at its end, which keeps them all."""

    def __init__(self, body: Body, wire: Wire) -> None:
        self.body, self.wire, self.frames = body, wire, list[SplitFrame]()
        self._down: queue.Queue[SplitFrame] = queue.Queue()
        self._session = Session("device", body, Limits(1 << 20, 16, PATIENCE_S), Budget(1 << 40), self._say)

    def send(self, frame: SplitFrame) -> None:
        """Up."""
        self._session.hear(self._carried(frame))

    def receive(self) -> SplitFrame:
        """Down."""
        return self._down.get(timeout=PATIENCE_S)

    def parts(self) -> list[Part]:
        """All that went over the link, part by part."""
        found: dict[tuple[int, int], Part] = {}
        for frame in self.frames:
            if isinstance(frame, Begin):
                found[frame.call, frame.part] = Part(frame)
            elif isinstance(frame, Values):
                part = found[frame.call, frame.part]
                match frame.what:
                    case "input":
                        part.inputs[frame.group] = frame.tensor
                    case "update":
                        part.updates[frame.group] = frame.tensor
                    case "hidden":
                        part.hidden = frame.tensor
                    case "hidden-gradient":
                        part.gradient = frame.tensor
        return list(found.values())

    def close(self) -> None:
        """End the session."""
        self._session.close()

    def _say(self, frame: SplitFrame) -> None:
        self._down.put(self._carried(frame))

    def _carried(self, frame: SplitFrame) -> SplitFrame:
        carried = decode_split(encode_split(frame, self.wire), self.wire)
        self.frames.append(carried)
        return carried


# What it makes of it


def tokens_of(embedded: Tensor, table_VE: Tensor) -> Tensor:
    """The nearest row of the public token embedding for each embedded token: ids (N,)."""
    norms = table_VE.square().sum(1)
    return torch.cat([(norms - 2 * rows @ table_VE.T).argmin(1) for rows in embedded.split(512)])


def labels_of(hidden: Tensor, gradient: Tensor, head: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The class y whose (p - e_y) W points as the gradient does, for a head (W, b) that is known; and how well it fits.

    Both (rows,). Every positive scale of the gradient gives the same answer, so nothing of the batch need be known.
    """
    weight, bias = head
    p_W = F.linear(hidden, weight, bias).softmax(1) @ weight
    along = (gradient * p_W).sum(1, keepdim=True) - gradient @ weight.T
    lengths = (p_W.square().sum(1, keepdim=True) - 2 * p_W @ weight.T + weight.square().sum(1)).clamp_min(1e-30).sqrt()
    fits = along / lengths / gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
    best = fits.max(1)
    return best.indices, best.values


def sides_of(gradients: Tensor) -> Tensor:
    """For two classes and a head nobody knows: on which side of the gradients' main axis each lies, 0 or 1, (rows,)."""
    axis = torch.linalg.svd(F.normalize(gradients, dim=1), full_matrices=False).Vh[0]
    return (gradients @ axis > 0).long()


def delta_weight_of(x: Tensor, update: Tensor, r: int | None = None) -> Tensor:
    """scaling x B A, (O, I), by least squares from tokens (N, I) and their updates (N, O).

    ``r``: the LoRA rank, which shows in the updates; what does not fit it is rounding, and is left out.
    """
    x, update = x.double(), update.double()
    if r is not None:
        axes = torch.linalg.svd(update, full_matrices=False).Vh[:r]
        update = update @ axes.T @ axes
    return torch.linalg.lstsq(x, update, driver="gelsd").solution.T


def unmask(embedded: Tensor, table_VE: Tensor) -> Tensor:
    """Ids (N,) of tokens that all had the same secret vector taken away (PrivSplit, algorithm 1): differences are public.

    Two tokens are tried until E_i - E_j is their difference for some i, j; that gives the vector, and it all the rest.
    """
    direction = torch.randn(table_VE.shape[1], generator=torch.Generator().manual_seed(0))
    along, order = (table_VE @ direction).sort()
    wanted = table_VE - (embedded[0] - embedded[1])  # E_j, if the first token is i
    places = torch.searchsorted(along, wanted @ direction).unsqueeze(1) + torch.arange(-8, 8)
    candidates = order[places.clamp(0, len(along) - 1)]  # (V, 16)
    gaps = (table_VE[candidates] - wanted.unsqueeze(1)).norm(dim=2).amin(1)
    return tokens_of(embedded - embedded[0] + table_VE[gaps.argmin()], table_VE)


# The sessions it watches


@dataclass
class Watched:
    """A session, and the truth, which only scoring looks at."""

    tap: Tap
    half: Half
    batches: list[Batch]
    factors: list[dict[str, Tensor]]  # as they were in each step

    def tokens(self) -> tuple[float, float]:
        """Share of the tokens, and of the whole texts, that are read right."""
        right, whole = [], []
        public = self.tap.body.network.get_input_embeddings().weight
        for part, batch in zip(self.tap.parts(), self.batches, strict=True):
            mask = batch.attention_mask.bool()
            hits = tokens_of(part.begin.embedded, public) == batch.input_ids[mask]
            right.append(hits)
            whole += [own.all() for own in hits.split(mask.sum(1).tolist())]
        return torch.cat(right).float().mean().item(), torch.stack(whole).float().mean().item()

    def delta_weight(self, module: str, step: int) -> Tensor:
        """The truth, (O, I)."""
        factors = self.factors[step]
        a, b = factors[f"{module}.lora_A"], factors[f"{module}.lora_B"]
        scaling: float = self.half.model.network.get_submodule(module).scaling
        return scaling * b[0].double() @ a[0].double()


def settings(model: str, data: str, wire: Wire, task: str, **more: object) -> Config:
    """A device's config."""
    tree = {
        "model": model, "task": task, "device": "cpu", "pooling": "mean" if task == "classification" else None,
        "data": {"train": data, "eval": data, "max_length": 64, "eval_limit": ROWS * STEPS},
        "train": {"learning_rate": 1e-3}, "split": {"cloud": "cloud", "wire": wire}, **more,
    }  # fmt: skip
    if task == "classification":
        tree["data"] |= {"text": "sentence", "label": "label", "labels": ["0", "1"]}
    return Config.parse(tree)


def watch(config: Config, body: Body, batches: Sequence[Batch]) -> Watched:
    """Train one device a step on each batch, over a link that the cloud keeps."""
    assert config.split is not None
    names = config.data.labels if config.task == "classification" else None
    half, tap = load_half(config, load_tokenizer(config.model), names), Tap(body, config.split.wire)
    half.link(lambda: tap, 1, lambda seconds: None)
    group = Participants(half.model.initial, [range(1)], config.train, torch.device("cpu")).groups[0]
    group.train_only(frozenset(group.parameters))
    factors = []
    for batch in batches:
        factors.append({name: tensor.detach().clone() for name, tensor in group.parameters.items()})
        local_steps(half.model, group, [[batch]], [config.train.learning_rate], config.train)
    tap.close()
    return Watched(tap, half, list(batches), factors)
