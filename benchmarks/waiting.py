"""What a simulation costs when the state of all peers waits in files, beside one in memory; also if
the kernel has no room for these files, so that each page is written to the disk and read again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from memory import status_bytes
from stacked_step import MODEL, machine_facts, table

import dlora
from dlora.config.run import Config
from dlora.events.log import read_log
from dlora.run import waiting

WAYS = {"memory": math.inf, "files": 0.0, "files, put out": 0.0}
GB = 1e9
MS_SYNC, MADV_PAGEOUT = 4, 21  # of Linux


class Peaks(threading.Thread):
    """Notes every 20 ms what is resident: pages of files, which the kernel may take back, apart."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.bytes = threading.Event(), {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}

    def run(self) -> None:
        """Until it is ``done``."""
        while not self.done.wait(0.02):
            for key, most in self.bytes.items():
                self.bytes[key] = max(most, status_bytes(key))


class PutOut(threading.Thread):
    """Writes the mapped files to the disk again and again, and takes their pages out of memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.libc = threading.Event(), ctypes.CDLL(None)

    def run(self) -> None:
        """Until it is ``done``."""
        while not self.done.wait(0.1):
            for line in Path("/proc/self/maps").read_text().splitlines():
                if line.endswith("(deleted)") and "/run/" in line:
                    start, end = (int(one, 16) for one in line.split()[0].split("-"))
                    place = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
                    self.libc.msync(*place, MS_SYNC)
                    self.libc.madvise(*place, MADV_PAGEOUT)


def measure(folder: Path, model: str, peers: int, rounds: int, put_out: bool) -> dict[str, float]:
    """One simulation in this process: seconds a round after the first, and what was resident."""
    rows = [
        {"text": f"{word} film number {row}", "label": word}
        for row in range(peers)
        for word in ("good", "bad")
    ]
    files = {"train": rows, "eval": rows[:4]}
    for name, some in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    train = {"rounds": rounds, "local_steps": 2, "per_device_train_batch_size": 1}
    config = Config.parse(
        {
            "model": model,
            "device": "cpu",
            "data": {name: str(folder / f"{name}.jsonl") for name in files},
            "train": train,
            "peers": {"count": peers, "group_size": 4},
            "eval_every": 0,
            "eval_peers": "none",
            "save_every": rounds,
            "output_dir": str(folder / "run"),
        }
    )
    peaks, out = Peaks(), PutOut()
    peaks.start()
    if put_out:
        out.start()
    dlora.simulate(config)
    peaks.done.set()
    out.done.set()
    seconds = [
        event["seconds"]
        for event in read_log(folder / "run" / "log.jsonl")
        if event["event"] == "round"
    ]
    took = [after - before for before, after in zip(seconds, seconds[1:], strict=False)]
    parameters = json.loads((folder / "run" / "summary.json").read_text())["trainable_parameters"]
    return {
        "state": 12 * peers * parameters,
        "round_s": statistics.median(took),
        "first_s": seconds[0],
        **peaks.bytes,
    }


def main() -> None:
    """Measure both in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--peers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="a folder on the disk that is measured")
    parser.add_argument("--one", choices=[*WAYS], help="one run, here, as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        waiting.MOST = WAYS[arguments.one]
        warnings.filterwarnings("ignore", "the state of")
        asked = arguments.model, arguments.peers, arguments.rounds
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measured = measure(Path(folder), *asked, arguments.one == "files, put out")
        print(json.dumps(measured))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.pairs):
        for way, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(done.stderr)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    print(machine_facts())
    print(f"\n{arguments.peers} peers, state {found['files'][0]['state'] / GB:.2f} GB\n")
    rows = [
        [
            way,
            f"{statistics.median(one['round_s'] for one in runs):.2f}",
            f"{statistics.median(one['first_s'] for one in runs):.2f}",
            *(f"{max(one[key] for one in runs) / GB:.2f}" for key in ("RssAnon", "RssFile")),
        ]
        for way, runs in found.items()
    ]
    head = ["state in", "s a round", "first round, s", "peak of memory, GB", "pages of files, GB"]
    print(table(head, rows))
    for way in [*WAYS][1:]:
        pairs = zip(found[way], found["memory"], strict=True)
        ratio = statistics.median(one["round_s"] / other["round_s"] for one, other in pairs)
        print(f"\nRatio of a round, {way}: {ratio:.2f} (median of pairs).")


if __name__ == "__main__":
    main()
