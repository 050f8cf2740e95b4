"""What a simulation takes on this machine: memory and seconds, also with other numbers of peers."""

from __future__ import annotations

import math
import os
import statistics
import time
from typing import Any

import psutil
import torch

from dlora.data.batches import Batch, collate
from dlora.decentralized.drawn import drawn_count
from dlora.lora.factors import num_parameters, stack
from dlora.run.grouping import STATE_BYTES, bytes_of_activations, usable_memory
from dlora.run.prepare import Prepared
from dlora.train import Participants, local_steps

PEERS = (10, 100, 1_000, 10_000)
TOGETHER = 4  # participants in a measured step; more change the time of each by little
STEPS = 4  # of which the first warms up
# A round of mixing reads and writes the factors as often as so many plain additions (measured with
# 1,000 peers on a ring, docs/lab-log.md).
MIXING = 3


def sizing(prepared: Prepared, others: bool = True) -> dict[str, Any]:
    """Measure a local step on the run's own rows, and estimate a round for the peers whose data are
    here and, if ``others``, for other numbers of peers.

    Seconds are those of one process on this machine. ``ranks`` (with ``others``): how many
    processes fit into its memory and have a GPU, or a core, each. Memory of one rank: this process
    with the frozen model (on a GPU: the model alone), what trains, and the activations of one
    participant.
    """
    parameters = num_parameters(stack(prepared.trained, 1))
    step_s = seconds_a_step(prepared)
    add_s = _seconds_to_add(prepared.model.device, parameters)
    activations = bytes_of_activations(prepared)
    held = sum(weight.nbytes for weight in prepared.model.network.parameters())
    if prepared.model.device.type == "cpu":
        held = psutil.Process().memory_info().rss  # with Python, its libraries and the rows
    places = torch.cuda.device_count() if prepared.model.device.type == "cuda" else os.cpu_count()
    usable, apart = usable_memory(prepared), prepared.model.device.type == "cuda"

    def needed(peers: int, ranks: int) -> float:
        """Bytes of one rank."""
        return float(held + activations + STATE_BYTES * parameters * -(-peers // ranks))

    def fitting(peers: int) -> int:
        """The most ranks; 0: what trains does not fit, however many ranks share it."""
        return max(
            (
                ranks
                for ranks in range(1, min(places or 1, peers) + 1)
                if needed(peers, ranks) * (1 if apart else ranks) <= usable
            ),
            default=0,
        )

    return {
        "step_s": step_s,
        "usable_bytes": usable,
        "activation_bytes": activations,
        "for_peers": {
            str(peers): {
                "rank_bytes": needed(peers, 1),
                "round_s": (
                    drawn_count(prepared.config.peers.participation, peers)
                    * (_steps_a_round(prepared, peers) * step_s + MIXING * add_s)
                ),
                **({"ranks": fitting(peers)} if others else {}),
            }
            for peers in sorted({len(prepared.names), *(PEERS if others else ())})
        },
    }


def _steps_a_round(prepared: Prepared, peers: int) -> float:
    """Local steps of each of so many peers, who divide the run's rows."""
    section = prepared.config.train
    if section.local_epochs is None or peers == len(prepared.names):
        return sum(prepared.local_steps) / len(prepared.names)
    rows = sum(len(rows) for rows in prepared.data.peers.values()) / peers
    rows_a_step = section.per_device_train_batch_size * section.gradient_accumulation_steps
    return max(1, math.ceil(section.local_epochs * rows / rows_a_step))


def seconds_a_step(prepared: Prepared) -> float:
    """Seconds of one participant's local step, measured on its first rows, stacked as in the run.

    The factors that it trains are thrown away.
    """
    section, names = prepared.config.train, prepared.names[:TOGETHER]
    count = min(len(names), prepared.config.peers.group_size or TOGETHER)
    rows_a_batch = section.per_device_train_batch_size

    def batches(step: int) -> list[Batch]:
        return [
            collate(
                [
                    prepared.data.peers[name][row]
                    for name, stream in zip(names[:count], prepared.streams, strict=False)
                    for row in stream.take(part * rows_a_batch, rows_a_batch)
                ],
                prepared.pad_token_id,
            )
            for part in range(
                step * section.gradient_accumulation_steps,
                (step + 1) * section.gradient_accumulation_steps,
            )
        ]

    device = prepared.model.device
    participants = Participants(prepared.model.initial, [range(count)], section, device)
    [group] = participants.groups
    group.train_only(frozenset(prepared.trained))
    took_s = []
    for step in range(STEPS):
        made = batches(step)
        began_at = time.perf_counter()
        local_steps(prepared.model, group, [made], [0.0], section, prepared.autocast_dtype)
        took_s.append(time.perf_counter() - began_at)  # the losses are on the CPU by now
    return statistics.median(took_s[1:]) / count


def _seconds_to_add(device: torch.device, numbers: int) -> float:
    """Seconds of one addition of ``numbers`` float32 numbers, as a part of a large one."""
    into, more = (torch.zeros(1 << 24, device=device) for _ in range(2))
    took_s = []
    for _ in range(STEPS):
        began_at = time.perf_counter()
        into.add_(more)
        into[0].item()  # a GPU works on until it is asked
        took_s.append(time.perf_counter() - began_at)
    return statistics.median(took_s[1:]) * numbers / len(into)
