"""What the device of a split really computes in a local step, counted by torch's FLOP counter,
beside the formula.

    DLORA_ASSETS=... python benchmarks/device_flops.py [--steps 3] [--set schedule.kind=kr ...]

The run of benchmarks/savings.yaml, its frozen model in a cloud of this process: only what the
device's thread computes is counted, training alone. LoRA: what `Adapter.update` and
`Adapter.gradients` compute. Head: all else, token embedding included (a look-up, which costs no
multiply-add). The formula is `dlora.lora.units.device_flops`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.utils.flop_counter import FlopCounterMode

import dlora
from dlora.config.run import Config
from dlora.events.kinds import Event
from dlora.lora.units import Unit, device_flops
from dlora.split.device.adapter import Adapter

CONFIG = Path(__file__).with_name("savings.yaml")


@dataclass(frozen=True)
class Step:
    """One local step: real tokens that went through it, FLOPs counted, and the formula's FLOPs a
    token for its active set.
    """

    tokens: int
    lora_flops: int
    head_flops: int
    formula: int


class _Nowhere:
    """In place of the counter's module tracker, which hooks the modules of all threads, the cloud's
    too.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *ignored: object) -> None: ...


class Counter(FlopCounterMode):
    """FLOPs of this thread."""

    mod_tracker: Any  # torch says ModuleTracker, and uses no more of it than `_Nowhere` has

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _Nowhere()


@dataclass
class Work:
    """What the device has computed so far: it hears a run's events, and `Adapter` tells what it
    does.
    """

    config: Config
    counter: Counter
    units: Sequence[Unit] = ()
    lora_flops: int = 0
    # (call, part) -> its real tokens
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    # (step, FLOPs a token from then on), of a scheduled run
    sets: list[tuple[int, int]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    before: tuple[int, int] = (0, 0)

    def hear(self, event: Event) -> None:
        """A listener: each local step by itself, without scoring and mixing."""
        now = self.lora_flops, self.counter.get_total_flops()
        if event["event"] == "active":
            self.sets.append((event["step"], event["device_flops"]))
        elif event["event"] == "step":
            lora, total = (after - before for after, before in zip(now, self.before, strict=True))
            self.steps.append(
                Step(sum(self.tokens.values()), lora, total - lora, self._formula(len(self.steps)))
            )
        if event["event"] in ("scores", "step", "round"):
            self.before = now
            self.tokens.clear()

    def _formula(self, step: int) -> int:
        placement, every = self.config.adapter_section.placement, range(len(self.units))
        told = [flops for since, flops in self.sets if since <= step]
        return told[-1] if told else device_flops(self.units, every, placement)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts every `Adapter` is counted."""

        def counted(of: Callable[..., Any]) -> Callable[..., Any]:
            def call(adapter: Adapter, call: Any, part: int, *rest: Any) -> Any:
                self.units = adapter.units
                self.tokens[call.number, part] = len(call.begins[part].embedded)
                with Counter() as counter:
                    result = of(adapter, call, part, *rest)
                self.lora_flops += counter.get_total_flops()
                return result

            return call

        update, gradients = counted(Adapter.update), counted(Adapter.gradients)
        with patch.multiple(Adapter, update=update, gradients=gradients):
            yield


def measure(config: Config) -> list[Step]:
    """Every local step of a simulation of one device with a `split:` block."""
    with Counter() as counter:
        work = Work(config, counter)
        with work.watching():
            dlora.simulate(config, listeners=[work.hear])
    return work.steps


def measure_short(settings: Sequence[str], num_steps: int) -> list[Step]:
    """The first local steps of savings.yaml with ``settings``, on few rows."""
    with tempfile.TemporaryDirectory() as folder:
        own = [
            "device=cpu",
            "split={cloud: cloud, wire: float32}",
            "data.limit=200",
            "data.eval_limit=8",
            "train.rounds=1",
        ]
        own += [f"train.local_steps={num_steps}", f"output_dir={folder}/run"]
        return measure(Config.load(CONFIG, [*own, *settings]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as `dlora simulate` takes it",
    )
    arguments = parser.parse_args()
    steps = measure_short(arguments.set, arguments.steps)
    print(
        "| step | tokens | LoRA FLOPs a token | by the formula | LoRA FLOPs | head FLOPs"
        " |\n|---|---|---|---|---|---|"
    )
    for number, step in enumerate(steps):
        of_token = step.lora_flops / step.tokens
        print(
            f"| {number} | {step.tokens} | {of_token:,.0f} | {step.formula:,} | {step.lora_flops:,}"
            f" | {step.head_flops:,} |"
        )


if __name__ == "__main__":
    main()
