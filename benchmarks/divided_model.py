"""What a rank holds of a divided frozen model (`shard_model`), and how long a local step takes,
beside ranks that hold the whole model.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from stacked_step import machine_facts, table

from dlora.config.training import LoraSection, TrainSection
from dlora.data.batches import Batch
from dlora.lora.sharded import ShardedModel
from dlora.lora.stacked import StackedModel, attach
from dlora.model.load import FrozenModel
from dlora.model.shards import mesh_of_all
from dlora.run.ranks import joined_ranks
from dlora.train import Participants, local_steps

VOCABULARY = 4096
LAYERS = 12
PEERS, ROWS, LENGTH = 2, 4, 64  # of a rank's batch
MIB = 1 << 20


def made_model(width: int) -> StackedModel:
    """A random Llama, whole on the CPU, with adapters on all linears."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        vocab_size=VOCABULARY,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config).requires_grad_(False)
    return attach(FrozenModel(network, "random", ()), LoraSection(), "causal-lm", 0)


def resident_mib() -> float:
    """This process's memory, after the C library has given back what it does not use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return float(psutil.Process().memory_info().rss) / MIB


def peak_mib() -> float:
    """The most memory since the last reset."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def measure(width: int, steps: int, divided: bool) -> dict[str, Any]:
    """One rank: build the model, divide it, take local steps."""
    ranks, device = joined_ranks(), torch.device("cpu")
    before = resident_mib()
    mesh = mesh_of_all(device)

    def made() -> StackedModel:
        model = made_model(width)
        return ShardedModel.of(model, mesh, ranks.any) if divided else model

    model = ranks.together(made, in_turns=True)
    held = resident_mib() - before
    participants = Participants(model.initial, [range(PEERS)], TrainSection(), device)
    [group] = participants.groups
    group.train_only(frozenset(participants.factors))
    ids = torch.randint(1, VOCABULARY, (PEERS * ROWS, LENGTH))
    batch = Batch(ids, torch.ones_like(ids), ids, None)
    took = []
    for number in range(steps + 1):
        if number == 1:  # the first step makes the optimiser's state
            Path("/proc/self/clear_refs").write_text("5")
        began_at = time.perf_counter()
        local_steps(model, group, [[batch]], [1e-3], TrainSection())
        took.append(time.perf_counter() - began_at)
    model.passes_done(backward=True)
    whole = sum(weight.numel() * weight.element_size() for weight in model.network.parameters())
    return {
        "whole_mib": whole / MIB,
        "held_mib": held,
        "peak_mib": peak_mib() - before,
        "step_s": statistics.median(took[1:]),
        "ranks": ranks.size,
        "main": ranks.is_main,
    }


def measured_apart(arguments: argparse.Namespace, divided: bool) -> dict[str, Any]:
    """`measure` of rank 0 under a torchrun of its own."""
    torchrun = shutil.which("torchrun", path=Path(sys.executable).parent.as_posix())
    assert torchrun is not None
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.json")
        command = [torchrun, "--standalone", "--nproc-per-node", str(arguments.ranks), __file__]
        command += ["--width", str(arguments.width), "--steps", str(arguments.steps)]
        command += ["--told", str(told), *(["--divided"] if divided else [])]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            sys.exit(done.stderr)
        found: dict[str, Any] = json.loads(told.read_text())
        return found


def main() -> None:
    """Measure ranks with the whole model and ranks with a part; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=768, help="hidden size of the Llama")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--divided", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.told is not None:  # one of the ranks
        found = measure(arguments.width, arguments.steps, arguments.divided)
        if found["main"]:
            arguments.told.write_text(json.dumps(found))
        return
    whole, part = (measured_apart(arguments, divided) for divided in (False, True))
    print(machine_facts())
    print(
        f"\na random Llama of {LAYERS} layers and width {arguments.width}: weights of"
        f" {whole['whole_mib']:.0f} MiB; {arguments.ranks} ranks over gloo, a thread each; a step"
        f" of {PEERS} peers, {ROWS} rows of {LENGTH} tokens each\n"
    )
    header = ["a rank of a model that is", "MiB after loading", "MiB at most in steps", "s a step"]
    rows = [
        [name, *(f"{of[key]:.{digits}f}" for key, digits in columns)]
        for name, of in (("whole", whole), ("divided", part))
        for columns in [(("held_mib", 0), ("peak_mib", 0), ("step_s", 2))]
    ]
    print(table(header, rows))
    print(
        f"\nratios: {part['held_mib'] / whole['held_mib']:.2f} of the memory after loading,"
        f" {part['peak_mib'] / whole['peak_mib']:.2f} of the memory in steps,"
        f" {part['step_s'] / whole['step_s']:.2f} times the time of a step"
    )


if __name__ == "__main__":
    main()
