"""Dec-LoRA's comparison: LoRA of several ranks beside other adapters, in one decentralised setting.

    DLORA_ASSETS=... python benchmarks/methods.py [--work runs/methods] [--jobs 2] [--rates]
    [--table]

Every run is a run folder of `dlora simulate` with a config of examples/paper; what is finished is
not run again, what was interrupted goes on. ``--rates``: the trials that chose the learning rates.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path(__file__).parents[1] / "examples" / "paper"
ASSETS = Path(os.environ.get("DLORA_ASSETS", "."))
FOLD = 20261129  # the seed of the split of files that have no training part
RATE_SEED = 11  # rates are chosen on this seed, which is in no table


class Method(NamedTuple):
    """A config of examples/paper, what is changed in it, and its learning rate of ``RATES``."""

    config: str
    changes: Sequence[str]
    rate: float


RATES = (5e-3, 2e-2)
METHODS = {
    **{
        f"LoRA r {r}": Method("ranks", [f"lora.r={r}", f"lora.lora_alpha={2 * r}"], rate)
        # 2e-2 was best for r 8; with r 16 it ended at chance
        for r, rate in ((2, 2e-2), (4, 2e-2), (8, 2e-2), (16, 5e-3))
    },
    "LoRA r 8 on nf4": Method("nf4", [], 2e-2),
    "LoRA r 8 on int8": Method("nf4", ["quantization=int8"], 2e-2),
    "FFA-LoRA r 8": Method("ffa", [], 2e-2),
    "bottleneck r 8": Method("bottleneck", [], 5e-3),
    "IA3": Method("ia3", [], 2e-2),
    "BitFit": Method("bitfit", [], 5e-3),
    "prompt of 8": Method("prompt", [], 2e-2),
}
TUNED = ("LoRA r 8", "FFA-LoRA r 8", "bottleneck r 8", "IA3", "BitFit", "prompt of 8")
RING, ERDOS = (
    ["peers.topology.kind=ring"],
    ["peers.topology.kind=erdos-renyi", "peers.topology.p=0.5", "peers.weights=laplacian"],
)
K1, K5 = (
    ["train.rounds=20", "train.local_epochs=1"],
    ["train.rounds=10", "train.local_epochs=5"],
)
SHARES = "data.partition={kind: label-shares, shares: [[0.15, 0.85], [0.85, 0.15], [0.5, 0.5]]}"
SETTINGS = {
    "ring, K 1, T 20": [*RING, *K1],
    "ER, K 1, T 20": [*ERDOS, *K1],
    "three label shares": [*RING, *K1, SHARES, "peers.count=3"],
    "ring, n 20": [*RING, *K1, "peers.count=20"],
    "ring, K 5, T 10": [*RING, *K5],
    "ER, K 5, T 10": [*ERDOS, *K5],
}
PAIRS = {
    "RTE": ("RTE", ("sentence1", "sentence2"), "label"),
    "QNLI": ("QNLI", ("question", "sentence"), "label"),
    "QQP": ("QQP", ("question1", "question2"), "is_duplicate"),
}
_QQP = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")


def pairs_of(work: Path, task: str) -> list[str]:
    """The overrides that read the task. QNLI and QQP have one file here: 400 rows of it, drawn
    once, are kept for the score.
    """
    name, texts, label = PAIRS[task]
    folder = ASSETS / "data" / "glue" / name
    train, held = folder / "train.tsv.gz", folder / "dev.tsv.gz"
    if not train.exists():
        one = next(path for path in folder.glob("*.tsv.gz"))
        train, held = work / f"{task}-train.tsv", work / f"{task}-eval.tsv"
        if not held.exists():
            work.mkdir(parents=True, exist_ok=True)
            _divide(one, train, held)
    return [
        *(f"data.train={train}", f"data.eval={held}", f"data.text=[{', '.join(texts)}]"),
        *(f"data.label={label}", "data.max_length=96", "data.eval_limit=400"),
    ]


def _divide(source: Path, train: Path, held: Path) -> None:
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    header = rows.pop(0) if rows[0][0] == "index" else list(_QQP)
    rows = [row for row in rows if len(row) == len(header)]
    random.Random(FOLD).shuffle(rows)
    for path, part in ((train, rows[400:]), (held, rows[:400])):
        lines = ["\t".join(row) for row in (header, *part)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Cell(NamedTuple):
    """One run."""

    folder: Path
    config: str
    changes: Sequence[str]


def cells(work: Path) -> dict[tuple[str, str], Cell]:
    """(setting, method) -> run, in the order in which they run."""
    settings = SETTINGS | {
        f"{task}, ring, K 1, T 20": [*RING, *K1, *pairs_of(work, task)] for task in PAIRS
    }
    return {
        (setting, name): Cell(
            work / f"{setting}-{name}".replace(", ", "-").replace(" ", "_"),
            method.config,
            [*method.changes, f"train.learning_rate={method.rate}", *changes],
        )
        for setting, changes in settings.items()
        for name, method in METHODS.items()
    }


def trials(work: Path) -> dict[tuple[str, str], Cell]:
    """(rate, method) -> run on the seed of the rates."""
    return {
        (f"{rate:g}", name): Cell(
            work / f"rate-{rate:g}-{name.replace(' ', '_')}",
            METHODS[name].config,
            [*METHODS[name].changes, f"train.learning_rate={rate}", f"seed={RATE_SEED}"],
        )
        for name in TUNED
        for rate in RATES
    }


def run_all(runs: Iterable[Cell], jobs: int) -> None:
    """Run what is not finished, ``jobs`` at a time, one thread each."""

    def run(cell: Cell) -> None:
        if (cell.folder / "summary.json").exists():
            return
        command = [sys.executable, "-m", "dlora.cli", "simulate"]
        if (cell.folder / "config.yaml").exists():
            command += [str(cell.folder / "config.yaml"), "--resume"]
        else:
            more = ["compare=[]", "eval_peers=none", f"output_dir={cell.folder}", *cell.changes]
            command += [str(CONFIGS / f"{cell.config}.yaml")]
            command += [part for one in more for part in ("--set", one)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        said = done.stderr.strip()[-300:] if done.returncode else ""
        print(f"{cell.folder.name}: exit {done.returncode} {said}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, runs))


def print_table(runs: dict[tuple[str, str], Cell]) -> None:
    """Accuracy of the average in per cent at the end, and at the best scored round."""
    columns = list(dict.fromkeys(column for column, _ in runs))
    print("| method | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in dict.fromkeys(name for _, name in runs):
        shown = []
        for column in columns:
            path = runs[column, name].folder / "summary.json"
            if not path.exists():
                shown.append("-")
                continue
            result = json.loads(path.read_text())["runs"]["dec-lora"]
            last, best = (result[key]["accuracy"] for key in ("consensus", "best"))
            shown.append(f"{100 * last:.1f} ({100 * best:.1f})")
        print(f"| {name} | " + " | ".join(shown) + " |")


def main() -> None:
    """Run, then print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rates", action="store_true", help="the trials of the learning rates")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    runs = (trials if arguments.rates else cells)(arguments.work)
    if not arguments.table:
        run_all(runs.values(), arguments.jobs)
    print_table(runs)


if __name__ == "__main__":
    main()
