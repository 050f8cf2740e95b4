"""A round on a slow line when the exchange runs beside the training: `Peer.mix(wait=False)`.

Two peers in network namespaces (root), a line of 1 MB/s each way, 20 ms one way. A message of 2 MB
takes about as long as the training of a round, which is a pause here: nothing else uses the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import yaml
from stacked_step import machine_facts, table
from torch import nn

import dlora
from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from kit.slow_line import Speed, namespaces  # of the tests

ADDRESSES = {"east": "10.213.8.1", "west": "10.213.8.2"}
NUMBERS, TRAIN_S = 500_000, 2.1
LINE = Speed(bytes_s=1e6, one_way_s=0.02)
MAX_RATIO = 1.15  # of the longer of the two, what the project promises
WAYS = {"sending alone": (0.0, True), "mix()": (TRAIN_S, True), "mix(wait=False)": (TRAIN_S, False)}


def node(name: str, folder: Path, way: str) -> None:
    """One peer: prints the seconds of each round."""
    value = nn.Parameter(torch.ones(NUMBERS))
    peer = dlora.Peer(
        folder / "peers.yaml",
        name=name,
        key=folder / f"{name}.key",
        federation=folder / "federation.yaml",
    )
    seconds, (train_s, wait) = list[float](), WAYS[way]
    with peer.joined({"value": value}):
        for _ in range(peer.rounds):
            began_at = time.perf_counter()
            time.sleep(train_s)
            peer.mix(wait=wait)
            seconds.append(time.perf_counter() - began_at)
        peer.average()
    print(json.dumps(seconds[1:]))


def rounds(folder: Path, spaces: dict[str, str], way: str, count: int) -> list[float]:
    """Seconds of each round of one peer, without the first."""
    members = [
        new_identity(name, f"{address}:7000", "peer", folder)[1]
        for name, address in ADDRESSES.items()
    ]
    (folder / "federation.yaml").write_text(federation_text(members))
    tree = {"members": [*ADDRESSES], "rounds": count, "state_dir": str(folder / "state")}
    (folder / "peers.yaml").write_text(yaml.safe_dump(tree))
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", space, sys.executable, __file__, name, str(folder), way],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for name, space in spaces.items()
    ]
    took: list[list[float]] = [json.loads(one.communicate(timeout=200)[0]) for one in processes]
    return took[0]


def main() -> None:
    """Measure each way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each way")
    arguments = parser.parse_args()
    medians = {"training alone": TRAIN_S}
    with ExitStack() as stack:
        spaces = stack.enter_context(namespaces([ADDRESSES], LINE))
        for way in WAYS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            medians[way] = statistics.median(rounds(folder, spaces, way, arguments.rounds))
    print(machine_facts())
    print(f"\n{4 * NUMBERS / 1e6:.0f} MB each way at {LINE.bytes_s / 1e6:.0f} MB/s\n")
    print(table(["", "s a round, median"], [[name, f"{s:.2f}"] for name, s in medians.items()]))
    longer = max(medians["training alone"], medians["sending alone"])
    ratio = medians["mix(wait=False)"] / longer
    print(f"\nRatio {ratio:.2f} of the longer of the two, target at most {MAX_RATIO}.")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        node(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    else:
        main()
