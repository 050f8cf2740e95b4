"""What agreement costs in accuracy: Dec-LoRA against pooled, local and fedavg on SST-2, paired over
seeds. Resumable.

    DLORA_ASSETS=... python benchmarks/quality.py [--work runs/quality] [--seeds 5] [--jobs 2]
    [--table]

Every run is a run folder of `dlora simulate`; what is finished is not run again, what was
interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIG = Path(__file__).with_name("quality.yaml")
DIRICHLET = [
    "data.partition.kind=dirichlet",
    "data.partition.concentration=0.1",
    "data.partition.min_rows=8",
]
# Peers of one label: AdamW steps as far from a satisfied gradient as from a large one, so the label
# that more peers hold wins. A plain gradient, unclipped, vanishes where a peer is satisfied; one
# local step a round leaves it no time to drift.
DIRICHLET += ["train.optimizer=sgd", "train.learning_rate=0.3", "train.max_grad_norm=null"]
DIRICHLET += ["train.rounds=100", "train.local_steps=1"]
CORE_RATE = "train.learning_rate=1"  # of 0.3, 1 and 3 the best on seed 11, which is in no table
STUDIES = {
    "iid": {
        "ring-factor": ["compare=[pooled]"],
        # pooled training likes a smaller rate than peers whose batches are an eighth of its own:
        # one peer holds it all
        "pooled-own-rate": [
            "peers.count=1",
            "train.per_device_train_batch_size=64",
            "train.learning_rate=5e-3",
        ],
    },
    "dirichlet-0.1": {
        "ring-factor": [*DIRICHLET, "compare=[pooled, local, fedavg]"],
        "ring-alternate": [*DIRICHLET, "peers.rule=alternate"],
        "base-k-factor": [*DIRICHLET, "peers.topology.kind=base-k"],
        "base-k-alternate": [*DIRICHLET, "peers.topology.kind=base-k", "peers.rule=alternate"],
    },
    "core": {
        "ring-factor": [*DIRICHLET, "eval_every=5"],
        "ring-core": [
            *DIRICHLET,
            "eval_every=5",
            "lora.placement=core",
            "lora.r=16",
            "lora.lora_alpha=32",
            CORE_RATE,
        ],
    },
}
# what it costs to add a round's exchange one round later
STUDIES["overlap"] = {
    f"{name}{'-overlap' if overlap else ''}": [
        *more,
        "eval_every=0",
        "eval_peers=none",
        f"peers.overlap={str(overlap).lower()}",
    ]
    for name, more in {"iid": [], "dirichlet-0.1": DIRICHLET}.items()
    for overlap in (False, True)
}
# percent; `print_bytes` says what was sent until the average first reached them
TARGETS = (70.0, 75.0)


def run_all(work: Path, studies: list[str], seeds: int, jobs: int) -> None:
    """Run what is not finished, seed after seed, ``jobs`` at a time, one thread each."""

    def run(study: str, name: str, seed: int, overrides: list[str]) -> None:
        folder = work / study / f"{name}-{seed}"
        if (folder / "summary.json").exists():
            return
        settings = [*overrides, f"seed={seed}", f"output_dir={folder}"]
        command = [sys.executable, "-m", "dlora.cli", "simulate", str(CONFIG)]
        command += [part for setting in settings for part in ("--set", setting)]
        if (folder / "config.yaml").exists():
            command.append("--resume")
        finished = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        print(
            f"{study} {name} seed {seed}: exit {finished.returncode}"
            f" {finished.stderr.strip()[-300:]}",
            flush=True,
        )

    with ThreadPoolExecutor(jobs) as pool:
        for study in studies:
            for seed in range(seeds):
                for name, overrides in STUDIES[study].items():
                    pool.submit(run, study, name, seed, overrides)


def print_tables(work: Path, studies: list[str], seeds: int) -> None:
    """Accuracy in percent at the final round: mean over seeds, and the paired difference to pooled,
    or the first row.
    """
    for study in studies:
        runs = STUDIES[study]
        accuracy: dict[str, list[float]] = {}
        for seed in range(seeds):
            for name in runs:
                path = work / study / f"{name}-{seed}" / "summary.json"
                if not path.exists():
                    continue
                for run, result in json.loads(path.read_text())["runs"].items():
                    label = name if run == "dec-lora" else run
                    if run != "local":  # nobody talks there: the average of strangers is no result
                        accuracy.setdefault(label, []).append(100 * result["consensus"]["accuracy"])
                    if result["peers_mean"] and run != "fedavg":
                        accuracy.setdefault(f"{label}, peers' own", []).append(
                            100 * result["peers_mean"]["accuracy"]
                        )
        complete = {label: values for label, values in accuracy.items() if len(values) == seeds}
        print(f"\n**{study}**, {seeds} seeds ({len(accuracy) - len(complete)} rows unfinished)\n")
        if not complete:
            continue
        base = "pooled" if "pooled" in complete else next(iter(complete))
        print(
            "| run | "
            + " | ".join(f"seed {seed}" for seed in range(seeds))
            + f" | mean | minus {base} (paired, s.e.) |"
        )
        print("|---|" + "---|" * (seeds + 2))
        for label, values in complete.items():
            differences = [
                value - other for value, other in zip(values, complete[base], strict=True)
            ]
            error = (
                statistics.stdev(differences) / len(differences) ** 0.5
                if seeds > 1
                else float("nan")
            )
            shown = " | ".join(f"{value:.2f}" for value in values)
            print(
                f"| {label} | {shown} | {statistics.mean(values):.2f} |"
                f" {statistics.mean(differences):+.2f} ({error:.2f}) |"
            )


def print_bytes(work: Path, seeds: int) -> None:
    """Of the study of the core: bytes of all messages until the average first reached each target;
    a dash: never.
    """
    print(
        "\n| run | target | "
        + " | ".join(f"seed {seed}, MB" for seed in range(seeds))
        + " |\n|---|---|"
        + "---|" * seeds
    )
    for name in STUDIES["core"]:
        for target in TARGETS:
            cells = []
            for seed in range(seeds):
                path = work / "core" / f"{name}-{seed}" / "log.jsonl"
                events = (
                    [json.loads(line) for line in path.read_text().splitlines()]
                    if path.exists()
                    else []
                )
                scores = [
                    event
                    for event in events
                    if event["event"] == "scores" and event["run"] == "dec-lora"
                ]
                reached = [
                    event for event in scores if 100 * event["consensus"]["accuracy"] >= target
                ]
                cells.append(f"{reached[0]['bytes_on_wire'] / 1e6:.2f}" if reached else "-")
            print(f"| {name} | {target:.0f} % | " + " | ".join(cells) + " |")


def main() -> None:
    """Run, then print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument(
        "--table", action="store_true", help="only print the tables of what is there"
    )
    arguments = parser.parse_args()
    if not arguments.table:
        run_all(arguments.work, arguments.studies, arguments.seeds, arguments.jobs)
    print_tables(arguments.work, arguments.studies, arguments.seeds)
    if "core" in arguments.studies:
        print_bytes(arguments.work, arguments.seeds)


if __name__ == "__main__":
    main()
