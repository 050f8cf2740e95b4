"""What each way to train an adapter through a cloud costs one device: bytes, round trips, FLOPs,
seconds; beside its accuracy.

    DLORA_ASSETS=... python benchmarks/table.py [--line] [--work runs/savings] [--set train.rounds=2
    ...]

The arms of savings.py and the run of savings.yaml (1,000 steps), its frozen model in a cloud; about
four minutes. Bytes are those of `dlora plan`, which counts each step's frames and which tests hold
against what the wire counts: of training, both ways, kr's and probe's of a run in which all units
are worth the same. Adapter bytes are of the whole run, hand-offs and warm-up (kr's rotation,
probe's steps with everything active) among them. FLOPs of the adapter are the formula's mean over
the run; torch's counter runs beside it for COUNTED steps under changing active sets, and must agree
to the last FLOP. The head's are the counter's. With --line, as root, a quarter of an hour more:
seconds a step at 100 Mbit/s and 30 ms there and back (`table_line.py`). With --work: accuracy of
finished runs of `savings.py --wire`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from dlora.config.run import Config
from dlora.costs.with_cloud import split_costs
from dlora.errors import ConfigError
from dlora.lora.active import schedule_units
from dlora.lora.kill_revive import Schedule
from dlora.lora.units import device_flops
from dlora.run.prepare import Prepared, prepare

sys.path.append(str(Path(__file__).parent))

from device_flops import measure_short
from savings import ARMS, CONFIG, SEEDS, folder_of, split_of
from stacked_step import machine_facts

TASK = "sst2"  # of savings.py; savings.yaml is that
WIRES = ("bfloat16", "int8")
LITERAL_8 = "literal r 8, "
ROWS = {arm if " r " in arm else f"{LITERAL_8}{arm}": settings for arm, settings in ARMS.items()}
COUNTED = 6  # steps
NEW_SETS = ["schedule.warmup_steps=1", "schedule.period=1"]  # an active set a step
HEADER = (
    *(
        "",
        "wire",
        "accuracy, %: mean (s.e.; seeds)",
        "adapter bytes a token",
        "of literal r 8, all",
        "adapter, MB",
    ),
    *(
        "warm-up, MB",
        "boundary, MB",
        "round trips a step",
        "LoRA FLOPs a token",
        "and head",
        "seconds a step (s.e.)",
    ),
)


class Flops(NamedTuple):
    """A token, on the device, mean over the run's steps."""

    lora: float
    head: float


def warm_up_bytes(prepared: Prepared) -> int:
    """The adapter's, before kr or probe choose for the first time."""
    steps = _schedule(prepared).warmup_steps if prepared.units else 0
    if not steps:
        return 0
    train = prepared.config.train.model_copy(update={"rounds": 1, "local_steps": steps})
    costs = split_costs(
        replace(prepared, config=prepared.config.model_copy(update={"train": train})), None
    )
    return int(costs["adapter_bytes"])


def flops(prepared: Prepared, settings: list[str], num_tokens: int) -> Flops:
    """By the formula; raises AssertionError where the counter disagrees. ``num_tokens``: of the
    run.
    """
    counted = measure_short([*settings, *NEW_SETS], COUNTED)
    for step in counted:
        assert step.lora_flops == step.tokens * step.formula, f"{settings}: the counter says {step}"
    [head_flops] = {step.head_flops for step in counted}
    steps = prepared.config.train.rounds * prepared.local_steps[0]
    head = head_flops * steps / num_tokens
    if prepared.units:
        schedule = _schedule(prepared)
        for _ in range(steps):
            schedule.observe({})
        return Flops(schedule.meter.device_flops / steps, head)
    assert prepared.half is not None
    units = prepared.half.agreement.units
    placement = prepared.config.lora.placement
    return Flops(device_flops(units, range(len(units)), placement), head)


def _schedule(prepared: Prepared) -> Schedule:
    config = prepared.config
    return schedule_units(
        config.schedule, prepared.units, config.lora, config.seed, prepared.names
    ).schedules[0]


def accuracy(work: Path | None, name: str, wire: str) -> str:
    """Of the finished runs of a row over that wire with just its settings; empty where there are
    none.
    """
    found = []
    for seed in SEEDS if work else ():
        assert work is not None
        folder = folder_of(work, TASK, name.removeprefix(LITERAL_8), seed, wire)
        if not (folder / "summary.json").exists():
            continue
        try:
            done = Config.load(folder / "config.yaml")
        except ConfigError as error:  # an earlier dlora's
            print(f"{folder} is left out: {error}", file=sys.stderr)
            continue
        if done != Config.load(
            CONFIG, [*ROWS[name], split_of(wire), f"seed={seed}", f"output_dir={done.output_dir}"]
        ):
            print(f"{folder} is left out: its settings are not the row's", file=sys.stderr)
            continue
        summary = json.loads((folder / "summary.json").read_text())
        found.append(100 * summary["runs"]["dec-lora"]["consensus"]["accuracy"])
    return f"{mean_and_error(found, 2)[:-1]}; {len(found)})" if found else ""


def mean_and_error(values: list[float], digits: int) -> str:
    """The mean, in brackets its standard error."""
    error = (
        f"{statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else "none"
    )
    return f"{statistics.mean(values):.{digits}f} ({error})"


def seconds(turns: int) -> dict[tuple[str, str], str]:
    """Of every row and wire; in brackets the standard error over ``turns`` steps, and their mean
    number of active units.
    """
    from table_line import on_the_line

    # the cloud there has one frame, of r 16
    rows = {name: settings for name, settings in ROWS.items() if name != "core r 64"}
    ways = {
        f"{name}/{wire}": [split_of(wire), *settings]
        for name, settings in rows.items()
        for wire in WIRES
    }
    cells = {}
    for way, steps in on_the_line(ways, turns).items():
        name, _, wire = way.rpartition("/")
        units = [active for _, active in steps if active is not None]
        shown = f"; {statistics.mean(units):.1f} units" if units else ""
        cells[name, wire] = mean_and_error([second for second, _ in steps], 2)[:-1] + shown + ")"
    return cells


def main() -> None:
    """Print one row for each way and wire."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--line",
        action="store_true",
        help="seconds a step over a slow line between namespaces (root)",
    )
    parser.add_argument(
        "--turns", type=int, default=15, help="steps of each row and wire that are timed"
    )
    parser.add_argument("--work", type=Path, help="where savings.py has its runs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as `dlora simulate` takes it",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine_facts() + "\n")
    timed = seconds(arguments.turns) if arguments.line else {}
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    whole: dict[str, float] = {}  # wire -> adapter bytes a token of the first row
    for name, settings in ROWS.items():
        computed: Flops | None = None  # the wire changes nothing of it
        for wire in WIRES:
            prepared = prepare(
                Config.load(CONFIG, ["device=cpu", split_of(wire), *settings, *arguments.set])
            )
            costs = split_costs(prepared, None)
            computed = computed or flops(prepared, settings, costs["tokens"])
            of_token = costs["adapter_bytes_a_token"]
            cells = [
                name,
                wire,
                accuracy(arguments.work, name, wire),
                f"{of_token:,.0f}",
                f"{100 * of_token / whole.setdefault(wire, of_token):.1f} %",
                f"{costs['adapter_bytes'] / 1e6:,.1f}",
                f"{warm_up_bytes(prepared) / 1e6:,.1f}",
                f"{costs['boundary_bytes'] / 1e6:,.1f}",
                f"{costs['round_trips_a_step']:.1f}",
                f"{computed.lora:,.0f}",
                f"{computed.lora + computed.head:,.0f}",
                timed.get((name, wire), ""),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
