"""What a lossy wire between cloud and device costs in accuracy: bfloat16 and int8 against float32
on SST-2, paired over seeds.

    DLORA_ASSETS=... python benchmarks/wires.py [--work runs/wires] [--seeds 5] [--table]

Both halves in one process, every frame through the codec. Finished runs are not run again,
interrupted ones go on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).with_name("wires.yaml")
WIRES = ("float32", "bfloat16", "int8")
MAX_LOSS_POINTS = 0.3  # and one standard error


def run_all(work: Path, seeds: int) -> None:
    """Run what is not finished, seed after seed, on one thread."""
    for seed in range(seeds):
        for wire in WIRES:
            folder = work / f"{wire}-{seed}"
            if (folder / "summary.json").exists():
                continue
            command = [sys.executable, "-m", "dlora.cli", "simulate", str(CONFIG)]
            for setting in (f"split.wire={wire}", f"seed={seed}", f"output_dir={folder}"):
                command += ["--set", setting]
            if (folder / "config.yaml").exists():
                command.append("--resume")
            finished = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
            )
            print(
                f"{wire} seed {seed}: exit {finished.returncode} {finished.stderr.strip()[-300:]}",
                flush=True,
            )


def print_table(work: Path, seeds: int) -> None:
    """Accuracy in percent, the paired difference to float32 with its standard error, and bytes."""
    results = {
        wire: [
            json.loads((work / f"{wire}-{seed}" / "summary.json").read_text())["runs"]["dec-lora"]
            for seed in range(seeds)
        ]
        for wire in WIRES
    }
    print(
        "| wire | "
        + " | ".join(f"seed {seed}" for seed in range(seeds))
        + " | mean | minus float32 (paired, s.e.) | MB |"
    )
    print("|---|" + "---|" * (seeds + 3))
    accuracy = {
        wire: [100 * run["consensus"]["accuracy"] for run in runs] for wire, runs in results.items()
    }
    for wire, values in accuracy.items():
        differences = [own - other for own, other in zip(values, accuracy["float32"], strict=True)]
        error = statistics.stdev(differences) / seeds**0.5 if seeds > 1 else float("nan")
        paired = "" if wire == "float32" else f"{statistics.mean(differences):+.2f} ({error:.2f})"
        megabytes = statistics.mean(run["cloud_bytes"] for run in results[wire]) / 1e6
        cells = [
            *(f"{value:.2f}" for value in values),
            f"{statistics.mean(values):.2f}",
            paired,
            f"{megabytes:.0f}",
        ]
        print(f"| {wire} | " + " | ".join(cells) + " |")
    print(f"\nTarget: at least -{MAX_LOSS_POINTS} - one standard error.")


def main() -> None:
    """Run, then print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/wires"), help="where the run folders lie"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        run_all(arguments.work, arguments.seeds)
    print_table(arguments.work, arguments.seeds)


if __name__ == "__main__":
    main()
