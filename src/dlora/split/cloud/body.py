"""The frozen model without its heads, in the cloud; hooks add the devices' updates to its
linears.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlora.config.cloud import CloudConfig
from dlora.errors import ModelError
from dlora.lora.core import (
    Directions,
    compute_directions,
    directions_of,
    read_directions,
    write_directions,
)
from dlora.lora.units import find_units
from dlora.model.layers import LINEAR, max_tokens
from dlora.model.load import body_maker, load_body_network
from dlora.seeds import derive_seed
from dlora.split.agreement import body_facts
from dlora.split.cloud.dropout import SeededDropout
from dlora.split.cloud.part import CloudPart
from dlora.split.tensors import bits
from dlora.wire.split.frames import Begin

PROBE_TOKENS = 64
# Memory that the attention of one layer needs for a short time while it computes, as a multiple of
# what it keeps for backward.
WORK_LAYERS = 2.0
PADDING_SEEN = 0.05  # relative; the rounding errors of bfloat16 and of int8 weights are smaller
# Relative change of a text's hidden states when the text before it in the row changes: 0 if the
# model keeps texts apart, 0.009 in DistilBERT, which does not.
NEIGHBOUR_SEEN = 1e-4


class Body:
    """A frozen body that runs parts of many devices at once and keeps nothing of them.

    ``facts``: what a device's half must agree with (`body_facts`). ``units``: all linears, by
    shared input. ``directions``: core directions by the body's names, for devices with placement
    core. Raises ModelError if the model cannot be split.

    Its attributes are facts of one model, found once and read by every part.
    """

    def __init__(self, network: Any, directions: Directions | None = None) -> None:
        self.network, self.directions = network.eval().requires_grad_(False), directions or {}
        self.units = find_units(body_maker(network))
        weights = (*network.parameters(), *network.buffers())
        # a second network in training mode, which shares all weights with the first
        self._training = copy.deepcopy(network, {id(weight): weight for weight in weights}).train()
        self._here = threading.local()
        for view in (self.network, self._training):
            for name, layer in view.named_modules():
                if isinstance(layer, LINEAR):
                    layer.register_forward_hook(partial(self._add_update, name))
        self._keys = set(inspect.signature(network.forward).parameters)
        self.facts = body_facts(network.config, network.get_input_embeddings())
        self.max_tokens = max_tokens(network) or 1 << 20  # tokens of one text
        self.num_positions, self.num_token_types = self._table_sizes()
        self._costs = {drops: self._cost(drops) for drops in (False, True)}
        self.bytes_a_token = self._costs[False][0]
        self._refuse_if_padding_matters()
        # whether texts that share a row do not see each other
        self.separates = self._keeps_texts_apart()

    @property
    def device(self) -> torch.device:
        """The torch device on which the embedded tokens enter the body."""
        device: torch.device = self.network.get_input_embeddings().weight.device
        return device

    def cannot(self, begin: Begin) -> str | None:
        """Why this model cannot run the part, in one line; None if it can."""
        # a packed row may be longer: only the positions of its texts count
        if begin.columns > self.max_tokens and not begin.packed:
            return f"a text of {begin.columns} tokens; this model takes {self.max_tokens}"
        if max(begin.positions, default=0) >= self.num_positions:
            return f"a position of {max(begin.positions)}; {self.num_positions} are known"
        if max(begin.token_types, default=0) >= self.num_token_types:
            return f"a token type of {max(begin.token_types)}; {self.num_token_types} are known"
        if begin.packed and not self.separates:
            return (
                f"{type(self.network).__name__} does not keep apart the texts that share a row:"
                " give each text a row, or an attention_mask if the row is one text"
            )
        return None

    def forward(self, part: CloudPart, dropout: float | None) -> Tensor:
        """Run one part; returns what the head reads, (rows, hidden width).

        ``dropout``: replaces all dropout rates of the model; None: the model keeps its own rates.
        """
        begin, index = part.begin, part.index
        tokens = begin.rows * begin.columns
        dtype = next(self.network.parameters()).dtype
        embedded = torch.zeros(
            tokens,
            begin.embedded.shape[1],
            dtype=dtype if dtype.is_floating_point else torch.float32,
        )
        embedded = embedded.to(self.device)
        embedded[index] = begin.embedded.to(embedded.device, embedded.dtype)
        arguments: dict[str, Any] = {
            "inputs_embeds": embedded.view(begin.rows, begin.columns, -1),
            # without a mask, transformers finds the texts of a packed row by their positions
            "attention_mask": None if begin.packed else part.mask.long(),
            "use_cache": False,
        }
        if begin.token_types:
            arguments["token_type_ids"] = self._spread(
                part, np.frombuffer(begin.token_types, np.uint8).astype(np.int64)
            )
        if begin.positions:
            arguments["position_ids"] = self._spread(
                part, np.array(begin.positions, dtype=np.int64)
            )
        dropping = begin.seed is not None and dropout != 0.0
        network = self._training if dropping else self.network
        self._here.part = part
        try:
            if dropping:
                seed = derive_seed(0, "body-dropout", str(begin.seed))
                with SeededDropout(torch.Generator(self.device).manual_seed(seed), dropout):
                    outputs = network(
                        **{key: value for key, value in arguments.items() if key in self._keys}
                    )
            else:
                outputs = network(
                    **{key: value for key, value in arguments.items() if key in self._keys}
                )
        finally:
            self._here.part = None
        if not begin.needed:
            pooled: Tensor = outputs.pooler_output
            return pooled
        wanted = torch.from_numpy(bits(begin.needed, len(index))).to(index.device)
        hidden: Tensor = outputs.last_hidden_state.flatten(0, 1)[index[wanted]]
        return hidden

    def _spread(self, part: CloudPart, values: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        """Put a number for each real token at its place: (N,) -> (rows, columns), 0 at padding."""
        spread = torch.zeros(part.mask.numel(), dtype=torch.int64, device=self.device)
        spread[part.index] = torch.from_numpy(values).to(self.device)
        return spread.view(part.mask.shape)

    def _add_update(
        self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        part: CloudPart | None = getattr(self._here, "part", None)
        update = part.update(name, inputs[0], output) if part is not None else None
        return None if update is None else output + update.to(output.dtype)

    def _table_sizes(self) -> tuple[int, int]:
        """How many positions and how many token types the model can look up.

        An index beyond a table would stop the GPU for all devices, so `cannot` refuses it before.
        """
        # GPT-2 looks token types up in the token table
        positions, types = 1 << 31, int(self.facts["vocabulary"])
        for name, layer in self.network.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(layer, nn.Embedding) and ("pos" in last or last == "wpe"):
                positions = layer.num_embeddings - int(getattr(layer, "offset", 0))
            elif isinstance(layer, nn.Embedding) and "token_type" in last:
                types = layer.num_embeddings
        return positions, types

    def _refuse_if_padding_matters(self) -> None:
        """Raise ModelError if real tokens see what is at padding, because the two halves pad
        differently.
        """
        real, noise = self._noise(4), self._noise(3, 1.0)
        alone = self._hidden(real, attention_mask=torch.ones(1, 4, dtype=torch.long))
        mask = (torch.arange(7) < 4).long()[None]
        padded = self._hidden(torch.cat([real, noise], dim=1), attention_mask=mask)[:, :4]
        if (padded - alone).norm() > PADDING_SEEN * alone.norm():
            raise ModelError(
                f"{type(self.network).__name__} cannot be split: its real tokens see what stands at"
                " padding"
            )

    def _keeps_texts_apart(self) -> bool:
        """Whether a text sees nothing of the text before it in the same row.

        No mask is given; only the positions begin again at the second text.
        """
        positions, text = torch.arange(4).repeat(2)[None], self._noise(4)
        first, second = (
            self._hidden(
                torch.cat([before, text], dim=1), attention_mask=None, position_ids=positions
            )[:, 4:]
            for before in (self._noise(4, seed=1), self._noise(4, seed=2))
        )
        return bool((second - first).norm() <= NEIGHBOUR_SEEN * first.norm())

    def _noise(self, tokens: int, scale: float = 0.02, seed: int = 0) -> Tensor:
        width = self.network.get_input_embeddings().embedding_dim
        return scale * torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _hidden(self, embedded: Tensor, **arguments: Tensor | None) -> Tensor:
        """The body's last hidden states in float32, without updates."""
        weight = next(self.network.parameters())
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        moved = {
            name: tensor if tensor is None else tensor.to(self.device)
            for name, tensor in arguments.items()
        }
        given = {"inputs_embeds": embedded.to(self.device, dtype), "use_cache": False} | moved
        output = self.network(**{key: value for key, value in given.items() if key in self._keys})
        hidden: Tensor = output.last_hidden_state.float()
        return hidden

    def memory(self, columns: int, drops: bool) -> int:
        """Bytes that one row of ``columns`` tokens needs for its forward and backward.

        They are a cost for each token and a cost for each pair of tokens. Attention keeps numbers
        for each pair if it is written out in full, as its dropout requires and as some models
        always do. ``drops``: the forward draws dropout.
        """
        a_token, a_pair = self._costs[drops]
        return columns * a_token + int(a_pair * columns * max(0, columns - PROBE_TOKENS))

    def _cost(self, drops: bool) -> tuple[int, float]:
        """Bytes that a forward keeps for its backward, for each token and for each pair of tokens.

        They are measured on texts of two lengths. The first number includes an update for every
        linear.
        """
        short = min(PROBE_TOKENS, self.max_tokens)
        long = min(2 * PROBE_TOKENS, self.max_tokens)
        a_token = self._kept_bytes(short, drops) / short
        a_pair = (
            (self._kept_bytes(long, drops) / long - a_token) / (long - short)
            if long > short
            else 0.0
        )
        layers = max(1, int(getattr(self.network.config, "num_hidden_layers", 1)))
        # adds the memory that one layer needs only while it computes
        beside = 1 + WORK_LAYERS / layers
        # the updates that devices send, and the units' inputs
        updates = 4 * sum(unit.width + unit.in_features for unit in self.units)
        return int(a_token) + updates, max(0.0, a_pair) * beside

    def _kept_bytes(self, tokens: int, drops: bool) -> int:
        weights = {weight.untyped_storage().data_ptr() for weight in self.network.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        dtype = next(self.network.parameters()).dtype
        width = self.network.get_input_embeddings().embedding_dim
        embedded = torch.zeros(
            1,
            tokens,
            width,
            dtype=dtype if dtype.is_floating_point else torch.float32,
            device=self.device,
        )
        mask = torch.ones(1, tokens, dtype=torch.long, device=self.device)
        mask[0, tokens // 2 + 1 :] = 0  # with padding, some models make a mask for each pair
        given = {
            "inputs_embeds": embedded.requires_grad_(),
            "attention_mask": mask,
            "use_cache": False,
        }
        arguments = {key: value for key, value in given.items() if key in self._keys}
        dropping = (
            SeededDropout(torch.Generator(self.device).manual_seed(0), 0.1)
            if drops
            else contextlib.nullcontext()
        )
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            dropping,
        ):
            outputs = (self._training if drops else self.network)(**arguments)
        del outputs
        return sum(kept.values())


def load_body(config: CloudConfig, directions: Directions | None = None) -> Body:
    """Load the body of ``config.model``; transformers must know it as an AutoModel.

    ``directions``: core directions by the body's names. If the config names a file of them
    (``core.frame``), the file is read; if there is no such file, they are computed and written to
    it. Raises ModelError.
    """
    network = load_body_network(config)
    linears = {name: layer for name, layer in network.named_modules() if isinstance(layer, LINEAR)}
    if config.core is not None:
        path = Path(config.core.frame)
        if path.exists():
            directions = directions_of(read_directions(path), linears, config.core.r)
        else:
            directions = compute_directions(linears, config.core.r)
            write_directions(path, directions)
    return Body(
        network, {name: tensor.to(network.device) for name, tensor in (directions or {}).items()}
    )
