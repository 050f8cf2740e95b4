"""Peak memory of a training step over the number of stacked peers: the slope is what one more peer
costs.
"""

from __future__ import annotations

import argparse
import ctypes.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from stacked_step import (
    MODEL,
    NUM_TOKENS,
    Stacked,
    machine_facts,
    make_config,
    random_batch,
    stacked_model,
    table,
)

from dlora.lora.factors import num_parameters, stack
from dlora.train import activation_bytes

PEERS, EXAMPLES, NUM_STEPS = (8, 16, 32, 64), (1, 4), 3
BYTES_PER_PARAMETER = 16  # float32 value, gradient and AdamW's two moments
MAX_RATIO = 1.1  # what the project promises
MIB = 2**20
# glibc raises its mmap threshold as it runs (up to 32 MiB); what is smaller comes from one heap,
# which keeps much of what is freed. With the threshold fixed at its initial 128 KiB a freed tensor
# goes back at once. "default" is what a user gets.
ALLOCATORS = {"default": {}, "mmap 128 KiB": {"MALLOC_MMAP_THRESHOLD_": "131072"}}
TCMALLOC = "libtcmalloc_minimal.so.4"  # of Debian's package libtcmalloc-minimal4
if ctypes.util.find_library("tcmalloc_minimal"):
    ALLOCATORS["tcmalloc"] = {"LD_PRELOAD": TCMALLOC}


def status_bytes(key: str) -> int:
    """A line of /proc/self/status, which counts in KiB: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measure(model: str, num_peers: int, num_examples: int) -> dict[str, int]:
    """In a process of its own: the peak of a few steps, above what the frozen model alone takes."""
    torch.set_num_threads(1)
    config = make_config(model)
    stacked = stacked_model(config)
    activations = activation_bytes(
        stacked, stack(stacked.initial, 1), random_batch(stacked, num_examples), autocast_dtype=None
    )
    start = status_bytes("VmRSS")
    # the highest so far was the loading of the model; count from here
    Path("/proc/self/clear_refs").write_text("5")
    training = Stacked(config, stacked, num_examples, num_peers)
    for _ in range(NUM_STEPS):
        training.step()
    return {
        "peak": status_bytes("VmHWM"),
        "start": start,
        "parameters": num_parameters(stack(stacked.initial, 1)),
        "activations": activations,
    }


def measure_apart(model: str, num_peers: int, num_examples: int, allocator: str) -> dict[str, int]:
    """`measure` in a fresh process with one malloc arena and one thread, so that the figure is the
    same each time.
    """
    command = [
        sys.executable,
        __file__,
        "--model",
        model,
        "--one",
        str(num_peers),
        str(num_examples),
    ]
    environment = (
        os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"} | ALLOCATORS[allocator]
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--one", nargs=2, type=int, metavar=("PEERS", "EXAMPLES"), help="one point, here, as JSON"
    )
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.model, *arguments.one)))
        return
    points, slopes = [], []
    for num_examples, allocator in itertools.product(EXAMPLES, ALLOCATORS):
        measured = [
            measure_apart(arguments.model, num_peers, num_examples, allocator)
            for num_peers in PEERS
        ]
        peaks = [point["peak"] for point in measured]
        points.append([num_examples, allocator, *[f"{peak / MIB:.1f}" for peak in peaks]])
        slope, _ = np.polyfit(PEERS, peaks, 1)
        state = BYTES_PER_PARAMETER * measured[0]["parameters"]
        budget = state + measured[0]["activations"]
        sizes = [f"{size / MIB:.2f}" for size in (slope, state, measured[0]["activations"], budget)]
        slopes.append([num_examples, allocator, *sizes, f"**{slope / budget:.2f}**"])
    torch.set_num_threads(1)
    print(machine_facts())
    print(
        f"{arguments.model}, {NUM_TOKENS} tokens an example, {NUM_STEPS} AdamW steps,"
        " MALLOC_ARENA_MAX=1\n"
    )
    print(
        table(
            ["examples a peer", "malloc", *[f"{num_peers} peers, MiB" for num_peers in PEERS]],
            points,
        )
        + "\n"
    )
    header = [
        "slope, MiB a peer",
        f"{BYTES_PER_PARAMETER} x parameters",
        "activations",
        "sum",
        "slope / sum",
    ]
    print(table(["examples a peer", "malloc", *header], slopes))
    print(f"\nTarget: slope / sum at most {MAX_RATIO}.")


if __name__ == "__main__":
    main()
