"""How many participants train at once: measured, and tried on the run's own rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlora.data.batches import collate
from dlora.data.formats import Example
from dlora.errors import RunError
from dlora.lora.factors import Factors, num_parameters, one, stack
from dlora.lora.layers import StackedCore, StackedLora
from dlora.lora.sharded import ShardedModel
from dlora.lora.stacked import StackedModel
from dlora.lora.swapped import SwappedModel
from dlora.model.layers import has_dropout
from dlora.run.free_memory import free_memory
from dlora.run.prepare import Prepared
from dlora.train import activation_bytes, forward

# fraction of the free memory; the rest is for the frozen model's temporary tensors and other
# programs
_USABLE_MEMORY = 0.6
# for each trained number: float32 value, gradient and two moments of AdamW; the gradient is there
# while its participant trains
STATE_BYTES, _GRADIENT_BYTES = 16, 4
_TRIED = 3  # participants of a trial; an odd number fits fewer tensor shapes by chance
# |together - alone| / |alone|: float32 rounding stays below 1e-4, another participant's factors
# give 1e-1
_ROUNDING = 2e-3


class Grouping(NamedTuple):
    """How many participants train at once.

    ``reason``: why it is one although memory has room for more; else None.
    """

    size: int
    reason: str | None


def find_grouping(prepared: Prepared, stored: int | None = None, waiting: bool = False) -> Grouping:
    """How many participants train at once: as many as memory holds, at least 1.

    It is 1 if the model mixes participants. The memory of one participant's forward is measured on
    a batch that repeats the longest row. ``stored``: the size with which a resumed run began.
    ``waiting``: the state of those that do not train is in files. Raises RunError if that size
    cannot have given right results. Warns if a model forces one at a time.
    """
    if prepared.half is not None or stored == 1:
        # through a cloud, tokens travel without padding, so one participant goes at a time
        return Grouping(1, None)
    ranks = prepared.ranks
    # a rank that fails in a pass of a divided model must end, because the others wait in that pass
    together = (lambda action: action()) if prepared.config.shard_model else ranks.together
    size = stored or min(ranks.gathered(together(lambda: _fitting(prepared, waiting))))
    if size == 1:
        return Grouping(1, None)
    rows_a_step = prepared.config.train.per_device_train_batch_size
    rows = [peer[:rows_a_step] for peer in list(prepared.data.peers.values())[:_TRIED]]
    reason = together(lambda: why_one_at_a_time(prepared.model, rows, prepared.pad_token_id))
    if reason is None:
        if prepared.config.lora.lora_dropout or has_dropout(prepared.model.network.config):
            warnings.warn(
                f"dropout: the {size} peers that train at once draw their masks together, real"
                " peers each its own, so that both end a little apart (1 to 5 % of the update);"
                " peers.group_size: 1 makes them equal, and slower",
                stacklevel=2,
            )
        return Grouping(size, None)
    if stored:
        raise RunError(
            f"{prepared.config.output_dir}: this run trained {stored} peers at once, but {reason},"
            " so that each was changed by the others; start anew in another output_dir"
        )
    warnings.warn(f"peers train one at a time, not {size} at once: {reason}", stacklevel=2)
    return Grouping(1, reason)


def why_one_at_a_time(
    model: StackedModel, rows: Sequence[Sequence[Example]], pad_token_id: int
) -> str | None:
    """Why the model's output for one participant depends on the others in the batch; None: it does
    not.

    ``rows``: some rows of each of at least two participants. They run through the model together
    and each alone, with different factors and rows of different lengths. Both must give the same
    logits. This finds what no shape shows: inputs without a batch dimension (DeBERTa's table of
    relative positions), tokens that are reordered, layers that see the padding or the whole batch.
    Afterwards the model is bound to the trial's factors (`StackedModel.use`).
    """
    if isinstance(model, SwappedModel):
        return model.reason
    network = model.network
    kind = type(network).__name__
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        return f"{kind} takes statistics over all rows of a batch (BatchNorm)"
    rows = _of_unequal_length(rows[:_TRIED])
    factors = _all_different(model, len(rows))
    draws = has_dropout(network.config) or any(
        layer.dropout
        for layer in network.modules()
        if isinstance(layer, (StackedLora, StackedCore))
    )
    # some models compute differently in training mode
    for training in (False,) if draws else (False, True):
        network.train(training)
        reason = _differs(model, factors, rows, pad_token_id)
        if reason is not None:
            return reason
    return None


def _differs(
    model: StackedModel, factors: Factors, rows: Sequence[Sequence[Example]], pad_token_id: int
) -> str | None:
    kind = type(model.network).__name__
    alone = [
        _logits(model, one(factors, number), own, pad_token_id) for number, own in enumerate(rows)
    ]
    try:
        together = _logits(model, factors, [row for own in rows for row in own], pad_token_id)
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
        if isinstance(model, ShardedModel):  # the other ranks wait in this pass
            raise
        return (
            f"{kind} cannot take the rows of several at once"
            f" ({(str(error).splitlines() or ['no reason given'])[0]})"
        )
    for own in alone:
        mine, together = together[: len(own)], together[len(own) :]
        for seen, expected in zip(mine, own, strict=True):
            if not (seen - expected).norm() <= _ROUNDING * expected.norm():
                return (
                    f"{kind} lets the rows of one peer, or their length, change what it computes"
                    " for another"
                )
    return None


@torch.no_grad()
def _logits(
    model: StackedModel, factors: Factors, rows: Sequence[Example], pad_token_id: int
) -> list[Tensor]:
    """The logits of each row: (classes,), or (its own tokens, vocabulary)."""
    model.use(factors)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some architectures draw random hashes; the seed makes them the same
        logits = forward(model, collate(rows, pad_token_id).to(model.device)).float()
    return [
        row if row.dim() == 1 else row[: len(example.input_ids)]
        for row, example in zip(logits, rows, strict=True)
    ]


def _of_unequal_length(rows: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """Each participant's rows, cut to another length for each participant.

    The last token stays last, because it may mark the end of a text.
    """
    longest = max(len(row.input_ids) for own in rows for row in own)
    count = min(len(own) for own in rows)
    return [
        [_cut(row, max(2, longest * (4 - number) // 4)) for row in own[:count]]
        for number, own in enumerate(rows)
    ]


def _cut(row: Example, length: int) -> Example:
    def cut(values: list[int]) -> list[int]:
        return values if len(values) <= length else [*values[: length - 1], values[-1]]

    types = None if row.token_type_ids is None else cut(row.token_type_ids)
    labels = cut(row.labels) if isinstance(row.labels, list) else row.labels
    return replace(row, input_ids=cut(row.input_ids), labels=labels, token_type_ids=types)


def _all_different(model: StackedModel, num_participants: int) -> Factors:
    """Different factors for each participant; their updates are about as large as the frozen
    linears' outputs.
    """
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.device)
        for name, tensor in stack(model.initial, num_participants, model.device).items()
    }


def _fitting(prepared: Prepared, waiting: bool) -> int:
    here = len(prepared.here)
    if prepared.config.peers.group_size is not None:
        return min(prepared.config.peers.group_size, here)
    usable_bytes = usable_memory(prepared) / prepared.ranks.on_one_device(prepared.model.device)
    parameters = num_parameters(stack(prepared.model.initial, 1))
    # of one participant: what it keeps, and what its turn takes on top
    kept_bytes = (STATE_BYTES - _GRADIENT_BYTES) * parameters
    turn_bytes = _GRADIENT_BYTES * parameters + bytes_of_activations(prepared)
    size = (
        usable_bytes / (kept_bytes + turn_bytes)
        if waiting
        else (usable_bytes - kept_bytes * here) / turn_bytes
    )
    return max(1, min(here, int(size)))


def usable_memory(prepared: Prepared) -> float:
    """Bytes of the device that a run may use now."""
    device = prepared.model.device
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return _USABLE_MEMORY * free_bytes


def bytes_of_activations(prepared: Prepared) -> int:
    """What one participant's forward pass keeps, on a batch that repeats the longest row."""
    rows = [row for peer in prepared.data.peers.values() for row in peer]
    longest = max(rows, key=lambda row: len(row.input_ids))
    batch = collate(
        [longest] * prepared.config.train.per_device_train_batch_size, prepared.pad_token_id
    )
    factors = stack(prepared.model.initial, 1, prepared.model.device)
    return activation_bytes(prepared.model, factors, batch, prepared.autocast_dtype)
