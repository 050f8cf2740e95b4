"""The command line from outside: output for people and for machines."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from dlora.show.words import seconds_text
from kit.call_cli import Outcome, call, contents, finish, furnish, start
from kit.cli_text import one_document, plain, words


@pytest.fixture(scope="module")
def template(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]
) -> tuple[Path, Any]:
    """A folder with a small run that is finished, and what `simulate --json` said of it."""
    folder = furnish(
        tmp_path_factory.mktemp("small") / "work", model_folder("bert"), {"compare": ["local"]}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, one_document(call("simulate", "run.yaml", "--json"))


@pytest.fixture
def work(template: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a copy of it."""
    folder = shutil.copytree(template[0], tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def test_the_table_says_what_summary_json_says(work: Path, template: tuple[Path, Any]) -> None:
    outcome = call("simulate", "run.yaml", "--resume")  # a finished run is only told again
    assert (outcome.exit_code, outcome.err) == (0, "")
    summary = json.loads(Path("run/summary.json").read_text())
    assert {**summary, "seconds": 0, "spent_s": 0} == {**template[1], "seconds": 0, "spent_s": 0}
    _, *rows, report, _ = plain(outcome.out).split("\n")
    assert report == "report: run/report.html"
    rows, times = rows[: len(summary["runs"])], rows[len(summary["runs"]) :]
    told = [re.split(r" {2,}", line.strip()) for line in times]
    assert told[0] == ["time", *summary["runs"], "all"]
    assert [line[0] for line in told[1:]] == [
        "start-up", "training", "exchange", "scoring", "saving", "report", "other", "in all",
    ]  # fmt: skip
    assert told[-1][-1] == plain(seconds_text(summary["spent_s"]["in_all"]))
    parts = [seconds for part, seconds in summary["spent_s"].items() if part != "in_all"]
    assert summary["spent_s"]["in_all"] == pytest.approx(sum(parts))
    for row, (name, run) in zip(rows, summary["runs"].items(), strict=True):
        scores = [
            f"{100 * run[of]['accuracy']:.1f} %" for of in ("consensus", "peers_mean", "best")
        ]
        assert re.split(r" {2,}", row.strip())[:3] == [name, *scores[:2]]
        assert f"{scores[2]} ({run['best']['rounds_done']})" in row


@pytest.mark.slow
def test_the_table_says_where_all_of_the_time_went(work: Path) -> None:
    """The parts add up to what a clock outside measures, but for the end of the process."""
    began = time.monotonic()
    process = start(
        work,
        "simulate",
        "run.yaml",
        "--set",
        "output_dir=timed",
        "--set",
        "train.local_steps=40",
        "--json",
    )
    outcome = finish(process)
    assert (outcome.exit_code, outcome.err) == (0, "")
    spent, outside_s = json.loads(outcome.out)["spent_s"], time.monotonic() - began
    parts = [seconds for part, seconds in spent.items() if part != "in_all"]
    assert (
        spent["in_all"] == pytest.approx(sum(parts)) and spent["other"] < 0.05 * spent["in_all"] + 1
    )
    assert spent["in_all"] < outside_s


def test_a_language_model_is_shown_by_its_perplexity(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    folder = furnish(
        tmp_path / "work",
        model_folder("llama", "causal-lm"),
        {"task": "causal-lm", "train.rounds": 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome = call("simulate", "run.yaml")
    assert outcome.exit_code == 0
    summary = json.loads((folder / "run/summary.json").read_text())
    assert "perplexity: average" in outcome.out
    assert f"  {summary['runs']['dec-lora']['consensus']['perplexity']:.2f}  " in outcome.out


def test_a_run_that_diverges_says_so(work: Path) -> None:
    overrides = [
        "--set",
        "train.learning_rate=1e30",
        "--set",
        "output_dir=diverged",
        "--set",
        "compare=[]",
    ]
    outcome = call("simulate", "run.yaml", "--json", *overrides)
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert (
        "dec-lora diverged in round" in outcome.err and "lower train.learning_rate" in outcome.err
    )


def test_set_overrides_the_config(work: Path) -> None:
    overrides = [
        "train.rounds=1",
        "peers.topology={kind: complete}",
        "train.learning_rate=1e-4",
        "output_dir=other",
    ]
    outcome = call("simulate", "run.yaml", *(part for key in overrides for part in ("--set", key)))
    assert (outcome.exit_code, outcome.err) == (0, "")
    resolved = yaml.safe_load(Path("other/config.yaml").read_text())
    assert resolved["train"]["rounds"] == 1
    assert resolved["train"]["learning_rate"] == 1e-4
    assert resolved["peers"]["topology"]["kind"] == "complete"
    assert resolved["lora"]["r"] == 4  # what was not overridden


@pytest.mark.filterwarnings("always")
def test_a_dry_run_where_a_run_stands_says_so_and_writes_nothing(work: Path) -> None:
    before = contents(work)
    outcome = call("simulate", "run.yaml", "--dry-run")
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert (
        "run holds this run already: --resume goes on with it" in words(outcome.out)
        and "would run dec-lora" in outcome.out
    )
    outcome = call("simulate", "run.yaml", "--dry-run", "--set", "seed=1")
    assert outcome.exit_code == 0 and "would run dec-lora" in outcome.out
    assert outcome.err.startswith(
        "warning: output_dir run holds another run, so this one would not start (resume: seed was 0"
    )
    assert contents(work) == before


def test_a_dry_run_says_what_would_run_and_writes_nothing(work: Path) -> None:
    Path("eval.jsonl").write_text(
        Path("eval.jsonl").read_text().replace('"label": 1', '"label": "[red]"')
    )
    Path("train.jsonl").write_text(
        Path("train.jsonl").read_text().replace('"label": 1', '"label": "[red]"')
    )
    before = contents(work)
    arguments = ["simulate", "run.yaml", "--set", "output_dir=other", "--dry-run"]
    table = call(*arguments)
    assert (table.exit_code, table.err) == (0, "")
    assert re.search(r"peer-3 +16 +2 +0 \d+, \[red\] \d+ *\n", table.out)  # not taken for a colour
    plan = one_document(call(*arguments, "--json"))
    assert plan["runs"] == ["dec-lora", "local"]
    assert [peer["rows"] for peer in plan["peers"]] == [16] * 4
    assert contents(work) == before


@pytest.mark.parametrize(
    ("arguments", "neighbours"),
    [
        (["ring", "-n", "5"], 2),
        (["complete", "-n", "5"], 4),
        (["erdos-renyi", "-n", "5", "--p", "0.6", "--seed", "1"], None),
        (["exponential", "-n", "8"], 5),
        (["hypercube", "-n", "8"], 1),
        (["base-k", "-n", "6", "-k", "2"], None),
        (["ring", "--weights", "laplacian"], 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_every_topology_is_described_and_drawn(
    arguments: list[str], neighbours: int | None, tmp_path: Path
) -> None:
    drawing = tmp_path / "graph.svg"
    table = call("topology", *arguments, "-o", drawing)
    assert (table.exit_code, table.err) == (0, "")
    figures = one_document(call("topology", *arguments, "--json"))
    assert f"spectral gap                   {figures['spectral_gap']:.3g}\n" in table.out
    assert (
        f" {figures['rounds_to_agree']:,} ({figures['messages_to_agree']:,} messages" in table.out
    )
    assert figures["kind"] == arguments[0]
    assert (
        len(figures["neighbours"][0])
        == figures["peers"]
        == (int(arguments[2]) if "-n" in arguments else 8)
    )
    if neighbours is not None:
        assert {len(weights) for period in figures["neighbours"] for weights in period} == {
            neighbours
        }
    root = ElementTree.parse(drawing).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert f"{arguments[0]} of {figures['peers']} peers" in drawing.read_text()


def test_eval_scores_the_adapters_again(work: Path, template: tuple[Path, Any]) -> None:
    before = contents(work)
    scores = one_document(call("eval", "run", "--json"))
    result = template[1]["runs"]["dec-lora"]
    expected = {"consensus": result["consensus"], **result["peers"]}
    assert scores.keys() == expected.keys()
    for name in expected:
        assert scores[name] == pytest.approx(expected[name], abs=1e-6)
    table = call("eval", "run")
    assert (table.exit_code, table.err) == (0, "")
    head, *rows = (re.split(r" {2,}", line.strip()) for line in plain(table.out).splitlines())
    assert head == ["adapter", "accuracy", "f1", "loss"]
    assert [row[0] for row in rows] == ["consensus", "peer-0", "peer-1", "peer-2", "peer-3"]
    assert rows[0][1] == f"{100 * result['consensus']['accuracy']:.1f} %"
    assert contents(work) == before


def test_eval_takes_other_data(work: Path) -> None:
    rows = [json.loads(line) for line in Path("eval.jsonl").read_text().splitlines()]
    # every right answer becomes a wrong one
    turned = [json.dumps({**row, "label": 1 - row["label"]}) for row in rows]
    Path("turned.jsonl").write_text("\n".join(turned))
    own, other = (
        one_document(call("eval", "run", "--json", *data))
        for data in ([], ["--data", "turned.jsonl"])
    )
    for name in own:
        assert other[name]["accuracy"] == pytest.approx(1 - own[name]["accuracy"])


def test_report_writes_the_page_again(work: Path) -> None:
    page = Path("run/report.html")
    first = page.read_text()
    page.unlink()
    outcome = call("report", "run")
    assert outcome == Outcome(0, "run/report.html\n", "")
    assert page.read_text() == first


@pytest.mark.filterwarnings("always")
def test_a_rank_above_what_a_weight_can_have_is_doubted(work: Path) -> None:
    outcome = call(
        "simulate", "run.yaml", "--dry-run", "--set", "output_dir=other", "--set", "lora.r=100"
    )
    assert outcome.exit_code == 0
    assert re.search(
        r"warning: lora.r 100: \S+ has only 64 rows or columns, a rank above that adds nothing\n",
        outcome.err,
    )
