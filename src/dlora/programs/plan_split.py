"""What the conversation with a cloud will cost: bytes down and up, round trips, by a count of every step's frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from dlora.data import Batch, collate
from dlora.evaluate import batches_of
from dlora.net.split_codec import split_num_bytes
from dlora.programs.prepare import Prepared
from dlora.programs.training import Training
from dlora.split.agreement import manifest_text
from dlora.split.calls import Request
from dlora.split.forecast import frames_of
from dlora.split.remote import Half, hidden_width
from dlora.split_frames import Begin, Done, Open, Opened, Values

LINES_MBIT_S = (4, 20, 100)
_DOWN = ("input", "hidden", "update-gradient")
_BOUNDARY = ("hidden", "hidden-gradient")
_LINK = Opened(1 << 14, 1 << 6)


def split_costs(prepared: Prepared, own: str | None) -> dict[str, Any]:
    """Of the device ``own``, with neighbours or without, or of a simulation of all, in a run in which nothing fails.

    ``adapter_bytes`` is what the groups of modules cost, ``boundary_bytes`` embedded tokens, hidden states and their
    gradients; both of training, both ways. ``scoring_bytes`` are those of all evaluations.
    """
    config, half, split = prepared.config, prepared.half, prepared.config.split
    assert half is not None and split is not None
    training = Training(prepared, prepared.local_steps, 1, False, lambda num_participants: None)
    trained, steps, tokens = Counter[str](), 0, 0
    for group in training.participants.groups:
        own_steps = config.train.rounds * training.local_steps[group.first]
        steps += own_steps
        for micro_batches in training.batches(group, 0, own_steps):
            for batch in micro_batches:
                trained += _batch_bytes(half, batch, split.pipeline, True)
                tokens += int(batch.attention_mask.sum())
    scored = Counter[str]()
    for batch in _scoring(prepared):
        scored += _batch_bytes(half, batch, split.pipeline, False)
    scorings = _num_scorings(prepared, own)
    opening = split_num_bytes(Open(manifest_text(half.facts, half.agreement)), split.wire)
    total = Counter[str]({"up": opening, "down": split_num_bytes(_LINK, split.wire)})
    for name, count in (trained + Counter({key: scorings * value for key, value in scored.items()})).items():
        total[name] += count
    return {
        "wire": split.wire,
        "steps": steps,
        "tokens": tokens,
        "groups": len(half.agreement.groups),
        "round_trips_a_step": 2 + 2 * len(half.agreement.groups) - (1 if half.agreement.groups else 0),
        "bytes_a_step": (trained["down"] + trained["up"]) / steps,
        "adapter_bytes_a_token": trained["adapter"] / tokens,
        "adapter_bytes": trained["adapter"],
        "boundary_bytes": trained["boundary"],
        "scoring_bytes": scorings * (scored["down"] + scored["up"]),
        "down_bytes": total["down"],
        "up_bytes": total["up"],
        "cloud_bytes": total["down"] + total["up"],
        "seconds_on_the_line": {f"{line} Mbit/s": max(total.values()) * 8 / (line * 1e6) for line in LINES_MBIT_S},
    }


def _batch_bytes(half: Half, batch: Batch, pipeline: int, keep: bool) -> Counter[str]:
    mask = batch.attention_mask != 0
    half.body.loss_positions = None
    if half.model.loss_positions and batch.labels.dim() == 2:
        half.body.loss_positions = F.pad(batch.labels[:, 1:] != -100, (0, 1))
    needed, positions = half.body.needed(mask, batch.input_ids), half.body.positions(batch.input_ids, mask)
    seed = (1 << 61) + 1 if keep and half.body.drops else None
    request = Request(torch.zeros(1, 1, 1).expand(*mask.shape, 1), mask, needed, batch.token_type_ids, positions, seed, ())
    widths = half.facts["embedding_width"], hidden_width(half.body.config)
    count = Counter[str]()
    for frame in frames_of(request, half.agreement, widths, pipeline, keep):
        num_bytes = split_num_bytes(frame, half.agreement.wire)
        down = isinstance(frame, Done) or (isinstance(frame, Values) and frame.what in _DOWN)
        boundary = isinstance(frame, Begin | Done) or (isinstance(frame, Values) and frame.what in _BOUNDARY)
        count["down" if down else "up"] += num_bytes
        count["boundary" if boundary else "adapter"] += num_bytes
    return count


def _scoring(prepared: Prepared) -> Iterator[Batch]:
    """The batches of one evaluation."""
    options = [option for choice in prepared.data.choices for option in choice.options]
    for rows in (prepared.data.evaluation, options):
        for chosen in batches_of(rows, prepared.config.per_device_eval_batch_size):
            yield collate([rows[index] for index in chosen], prepared.pad_token_id)


def _num_scorings(prepared: Prepared, own: str | None) -> int:
    """How often all evaluation rows go through the body: before, in between, and at the end for each and the average.

    A device with neighbours scores itself in between, itself and the average at the end.
    """
    config, count = prepared.config, len(prepared.names)
    if own is not None and config.peers.members:
        every = config.eval_peers_every or config.eval_every
        return 2 + ((config.train.rounds - 1) // every if every else 0)
    each = count if count > 1 else 0  # of one participant the average is its own

    def due(every: int, rounds_done: int) -> bool:
        return bool(every) and rounds_done % every == 0

    scorings = 1 + 1 + each
    for rounds_done in range(1, config.train.rounds):
        peers = due(config.eval_peers_every, rounds_done)
        scorings += (peers or due(config.eval_every, rounds_done)) + each * peers
    return scorings
