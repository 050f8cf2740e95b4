"""Seconds a training step takes through a cloud over a slow line, of many ways to train: for
`table.py --line`.

Root only: the cloud and the devices are a process each in a network namespace each, 100 Mbit/s and
30 ms there and back between them, mutual TLS. Each way is a run of `dlora device` in a thread of
its own; one takes steps at a time, in turns, so that what else the machine does meets all alike. A
step counts when nothing was new in it: not the first after a pause (TCP starts anew), nor one that
hands off. Active sets change more often than in the row (`PERIODS`), so that the counted steps have
several.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.errors import Interrupted
from dlora.events.kinds import Event
from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from dlora.programs.device import device
from dlora.split.cloud.body import load_body

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

from savings import CONFIG
from split_step import LINE, LINES, MODEL, PORT, cloud

from kit.slow_line import namespaces  # of the tests

SHORT = [
    "device=cpu",
    "data.limit=400",
    "data.eval_limit=8",
    "train.rounds=1",
    "train.local_steps=1000",
]
SHORT += ["schedule.warmup_steps=1"]
# steps; of which kr's trial has two, a fifth as in the row; the first comes after ten
PERIODS = {"kr": 10, "random": 2}
CORE_R = 16
# seconds, and active units where a schedule says so, of each counted step
Measured = list[tuple[float, int | None]]


def on_the_line(ways: Mapping[str, Sequence[str]], turns: int) -> dict[str, Measured]:
    """``turns`` counted steps of each of ``ways``: name -> settings upon those of `savings.yaml`,
    split block among them.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        line = LINES[0]
        for number in range(len(ways)):
            new_identity(f"device{number}", None, "device", folder)
        new_identity("hub", f"{line['hub']}:{PORT}", "cloud", folder)
        (folder / "hub.yaml").write_text(federation_text(sorted(folder.glob("*.member.yaml"))))
        (folder / "ways.json").write_text(
            json.dumps({name: [*settings] for name, settings in ways.items()})
        )
        core = {"r": CORE_R, "frame": str(folder / "frame")}
        # makes the file, as the cloud would
        load_body(CloudConfig.parse({"model": MODEL, "device": "cpu", "core": core}))
        spaces = stack.enter_context(namespaces([line], LINE))
        inside = {end: ["ip", "netns", "exec", space] for end, space in spaces.items()}
        stack.enter_context(
            cloud(folder, f"0.0.0.0:{PORT}", inside["hub"], f"core: {json.dumps(core)}\n")
        )
        command = [
            *inside["phone"],
            sys.executable,
            __file__,
            "--folder",
            str(folder),
            "--turns",
            str(turns),
        ]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {
        name: [(seconds, units) for seconds, units in steps]
        for name, steps in json.loads(told).items()
    }


class Device(threading.Thread):
    """One way's run, which takes a step when told to."""

    def __init__(self, number: int, settings: Sequence[str], folder: Path) -> None:
        super().__init__(daemon=True)
        self.identity, self.folder = f"device{number}", folder
        own = [f"output_dir={folder / self.identity}"]
        if "lora.placement=core" in settings:
            own.append(f"lora.frame={folder / 'frame'}")
        kind = Config.load(CONFIG, [*settings]).schedule.kind
        period = [f"schedule.period={PERIODS[kind]}"] if kind in PERIODS else []
        self.config = Config.load(CONFIG, [*settings, *SHORT, *period, *own])
        self.go, self.done = threading.Semaphore(0), queue.Queue[float | Exception]()
        self.over = False
        self.began_at = 0.0
        self.units: int | None = None  # active in the step under way
        self.is_new = True  # whether others were active before it
        self.told: list[int] = []  # of the step after it

    def run(self) -> None:
        """Until ``over``."""
        key, federation = self.folder / f"{self.identity}.key", self.folder / "hub.yaml"
        try:
            device(
                self.config,
                name=self.identity,
                key=key,
                federation=federation,
                listeners=[self.hear],
            )
        except Interrupted:
            pass
        except Exception as error:
            self.done.put(error)

    def hear(self, event: Event) -> None:
        """A listener: a step is done, and the next one begins when it is this device's turn."""
        if event["event"] == "active":
            self.told = [len(event["units"])]
        if event["event"] != "step":
            return
        self.done.put(time.perf_counter() - self.began_at)
        self.go.acquire()
        if self.over:
            raise Interrupted("enough")
        self.is_new, self.units, self.told = (
            bool(self.told),
            self.told[0] if self.told else self.units,
            [],
        )
        self.began_at = time.perf_counter()

    def wait(self) -> float:
        """For the step under way; its seconds."""
        done = self.done.get(timeout=300)
        if isinstance(done, Exception):
            raise done
        return done

    def turn(self) -> tuple[float, int | None]:
        """Steps until one counts; the first never does."""
        for steps in range(100):
            self.go.release()
            seconds = self.wait()
            if steps and not self.is_new:
                return seconds, self.units
        raise RuntimeError(f"{self.identity}: another active set in every step")


def take_turns(folder: Path, turns: int) -> None:
    """The devices' process: prints what `on_the_line` reads."""
    torch.set_num_threads(1)
    ways = json.loads((folder / "ways.json").read_text())
    devices = {
        name: Device(number, settings, folder)
        for number, (name, settings) in enumerate(ways.items())
    }
    for name, one in devices.items():
        one.start()
        one.wait()
        print(f"linked: {name}", file=sys.stderr)
    measured: dict[str, Measured] = {name: [] for name in devices}
    for turn in range(turns):
        for name, one in devices.items():
            measured[name].append(one.turn())
        print(f"turn {turn + 1} of {turns}", file=sys.stderr)
    for one in devices.values():
        one.over = True
        one.go.release()
        one.join()
    print(json.dumps(measured))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--turns", type=int, required=True)
    arguments = parser.parse_args()
    take_turns(arguments.folder, arguments.turns)
