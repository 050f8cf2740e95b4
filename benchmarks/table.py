"""What each way to train an adapter through a cloud moves and computes: bytes, round trips and FLOPs of one device's run.

    DLORA_ASSETS=... python benchmarks/table.py [--set train.rounds=2 ...]

The run of benchmarks/savings.yaml (1,000 steps) with its frozen model in a cloud. Bytes are those of `dlora plan`, which counts
each step's frames and which tests hold against what the wire counts; kr's are of a run in which all units are worth the same.
FLOPs are the formula that benchmarks/device_flops.py holds against torch's counter. Accuracy is in benchmarks/savings.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dlora.config import Config
from dlora.lora.active import schedule_units
from dlora.lora.groups import device_flops
from dlora.programs.plan_split import split_costs
from dlora.programs.prepare import Prepared, prepare

CONFIG = Path(__file__).with_name("savings.yaml")
CORE = ["lora.placement=core", "lora.r=16", "lora.lora_alpha=32"]
KR = ["schedule.kind=kr", "schedule.period=100"]
ROWS = {
    "literal r 8, all": [],
    "literal r 8, kr 1/8, hand-off": KR,
    "literal r 8, kr 1/8, drop": [*KR, "schedule.on_kill=drop"],
    "literal r 8, random 1/8": ["schedule.kind=random", "schedule.period=50"],
    "literal r 16, all": ["lora.r=16", "lora.lora_alpha=32"],
    "core r 16, all": CORE,
    "core r 16, kr 1/8": [*CORE, *KR],
}
HEADER = ("", "wire", "adapter bytes a token", "adapter, MB", "boundary, MB", "round trips a step", "LoRA FLOPs a token")


def flops_a_token(prepared: Prepared) -> float:
    """Mean over the run's steps."""
    config, units = prepared.config, prepared.units
    if not units:
        assert prepared.half is not None
        groups = prepared.half.agreement.groups
        return float(device_flops(groups, range(len(groups)), config.lora.r, config.lora.placement))
    [schedule] = schedule_units(config.schedule, units, config.lora, config.seed, prepared.names).schedules
    steps = config.train.rounds * prepared.local_steps[0]
    for _ in range(steps):
        schedule.observe({})
    return schedule.device_flops / steps


def main() -> None:
    """Print one row for each way and wire."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as `dlora simulate` takes it")
    arguments = parser.parse_args()
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for name, settings in ROWS.items():
        for wire in ("bfloat16", "int8"):
            split = f"split={{cloud: cloud, wire: {wire}}}"
            prepared = prepare(Config.load(CONFIG, ["device=cpu", split, *settings, *arguments.set]))
            costs = split_costs(prepared, None)
            cells = [
                name,
                wire,
                f"{costs['adapter_bytes_a_token']:,.0f}",
                f"{costs['adapter_bytes'] / 1e6:.1f}",
                f"{costs['boundary_bytes'] / 1e6:.1f}",
                f"{costs['round_trips_a_step']:.1f}",
                f"{flops_a_token(prepared):,.0f}",
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
