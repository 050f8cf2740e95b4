"""The command line from outside: help, output for people and for machines, and runs that are
interrupted.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import dlora
from dlora.events.log import read_log
from dlora.show.words import NBSP, seconds_text
from kit.call_cli import (
    Outcome,
    assert_identical,
    call,
    contents,
    final_factors,
    finish,
    furnish,
    start,
    without_news,
)

REPOSITORY = Path(__file__).parents[2]
OPTIONS = {
    "simulate": ["CONFIG", "--set", "--resume", "--json", "--dry-run"],
    "peer": [
        "CONFIG",
        "--name",
        "--key",
        "--federation",
        "--listen",
        "--set",
        "--resume",
        "--json",
    ],
    "plan": ["CONFIG", "--name", "--set", "--json"],
    "eval": ["RUN", "--data", "--json"],
    "report": ["RUN"],
    "topology": ["KIND", "--peers", "--p", "--seed", "-k", "--weights", "--output", "--json"],
}
# time to interrupt one
LONG_ROUNDS = {"train.rounds": 4, "train.local_steps": 30, "peers.count": 2, "save_every": 2}
CLOCKS = {"seconds", "spent_s", "participant_steps_per_second", "tokens_per_second"}


def one_document(outcome: Outcome) -> Any:
    """What a command with --json says: one JSON document on one line, nothing else, no NaN in
    it.
    """
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert outcome.out.endswith("\n") and outcome.out.count("\n") == 1
    return json.loads(
        outcome.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON")
    )


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


def plain(text: str) -> str:
    """The text with spaces where no line may break."""
    return text.replace(NBSP, " ")


def words(text: str) -> str:
    """The text without the frames around it and the line breaks in it."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_help_names_the_commands_and_the_exit_codes() -> None:
    outcome = call("--help")
    assert (outcome.exit_code, outcome.err) == (0, "")
    text = words(outcome.out)
    assert [command for command in OPTIONS if f" {command} " not in text] == []
    codes = (
        "0 done, 2 your mistake (the message says how to fix it), 3 the other side's, 4 interrupted"
        " and resumable."
    )
    assert f"Exit codes: {codes}" in text


def test_without_a_command_there_is_the_help() -> None:
    outcome = call()
    assert outcome.exit_code == 2
    assert words(outcome.out) == words(call("--help").out)
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help_of_a_command_shows_its_options_and_an_example(command: str) -> None:
    outcome = call(command, "--help")
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert [option for option in OPTIONS[command] if option not in outcome.out] == []
    assert f"Example: dlora {command} " in words(outcome.out)
    assert call(command, "-h").out == outcome.out


def test_the_examples_in_the_help_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(
        r"Example: dlora (simulate (\S+) .*?) Options", words(call("simulate", "--help").out)
    )
    assert example is not None
    assert (REPOSITORY / example[2]).is_file()
    example = re.search(
        r"Example: dlora (topology .*?\.svg)", words(call("topology", "--help").out)
    )
    assert example is not None
    monkeypatch.chdir(tmp_path)
    assert call(*shlex.split(example[1])).exit_code == 0


def test_the_version() -> None:
    assert call("--version") == Outcome(0, f"dlora {dlora.__version__}\n", "")


def test_shell_completion_can_be_installed() -> None:
    assert "--install-completion" in call("--help").out


@pytest.mark.parametrize(
    "arguments", [["simulate"], ["plan"], ["eval"], ["peer", "run.yaml"], ["topology"]]
)
def test_what_is_missing_on_the_command_line_is_shown_by_an_example(arguments: list[str]) -> None:
    outcome = call(*arguments)
    assert outcome.exit_code == 2 and outcome.err.count("\n") == 1
    assert f"example: dlora {arguments[0]} " in outcome.err
    assert ("dlora config > run.yaml" in outcome.err) == ("CONFIG" in outcome.err)


@pytest.mark.parametrize("command", ["simulate", "peer", "device", "plan", "eval", "cloud"])
def test_the_first_line_comes_before_anything_slow_is_imported(
    command: str, tmp_path: Path
) -> None:
    """At that moment neither torch nor transformers is there; the line is no slower than Python and
    typer are.
    """
    needed = (
        []
        if command in ("simulate", "plan", "eval")
        else ["--name", "a", "--key", "a.key", "--federation", "f.yaml"]
    )
    code = f"""
import sys
from dlora import cli

class Watching:
    def __getattr__(self, name):
        return getattr(sys.__stderr__, name)

    def write(self, text):
        if text.strip():
            heavy = {{"torch", "transformers", "numpy"}} & sys.modules.keys()
            print(text.strip()[9:17], *sorted(heavy))
            sys.exit(0)

sys.stderr = Watching()
sys.argv = {["dlora", command, "run.yaml", *needed]!r}
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert (done.stdout, done.stderr) == ("starting\n", "")


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


# --- interrupted runs, in processes of their own
# -------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A folder with a run of a few long rounds that nobody interrupted."""
    folder = furnish(tmp_path_factory.mktemp("long") / "work", model_folder("bert"), LONG_ROUNDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("simulate", "run.yaml").exit_code == 0
    return folder


@pytest.fixture
def fresh(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder has the same config and data, and no run."""
    folder = shutil.copytree(whole, tmp_path / "work", ignore=shutil.ignore_patterns("run"))
    monkeypatch.chdir(folder)
    return folder


def wait_for_round(process: subprocess.Popen[str], run: Path, number: int) -> None:
    """Until the log of ``run`` holds that round; fails when the process ends before it."""
    deadline = time.monotonic() + 100
    while number not in rounds_logged(run):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.005)


def rounds_logged(run: Path) -> list[int]:
    log = run / "log.jsonl"
    return (
        [event["round"] for event in read_log(log) if event["event"] == "round"]
        if log.exists()
        else []
    )


def assert_as_if_uninterrupted(run: Path, whole: Path) -> None:
    """Factors bit for bit, the summary but for its clocks, and every round once in the log."""
    assert_identical(final_factors(run), final_factors(whole / "run"))
    results = [
        json.loads((folder / "summary.json").read_text())["runs"]["dec-lora"]
        for folder in (run, whole / "run")
    ]
    ours, theirs = (
        {key: value for key, value in result.items() if key not in CLOCKS} for result in results
    )
    assert ours == theirs
    assert rounds_logged(run) == [0, 1, 2, 3]


def resume(message: str) -> None:
    """Do what the message says."""
    _, _, command = message.rpartition("go on with: ")
    name, *arguments = shlex.split(command)
    assert name == "dlora"
    outcome = call(*arguments)
    assert (outcome.exit_code, outcome.err) == (0, "")


def test_ctrl_c_finishes_the_round_and_says_how_to_go_on(fresh: Path, whole: Path) -> None:
    process = start(fresh, "simulate", "run.yaml", "--set", "output_dir=my run")
    wait_for_round(process, fresh / "my run", 0)
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert (outcome.exit_code, outcome.out) == (4, "")
    # and nothing else: no bars where there is no terminal
    announcement, message = outcome.err.splitlines()
    assert announcement == "stopping after this round; Ctrl-C again discards it"
    stopped = re.match(
        r"dec-lora stopped after round (\d) of 4, finished and saved; go on with: ", message
    )
    assert stopped is not None, message
    *_, checkpoint = sorted(Path("my run/checkpoints/dec-lora").iterdir())
    assert checkpoint.name == f"round-00000{stopped[1]}"
    resume(message)
    assert_as_if_uninterrupted(Path("my run"), whole)


@pytest.mark.slow
def test_ctrl_c_twice_discards_the_round(fresh: Path, whole: Path) -> None:
    process = start(fresh, "simulate", "run.yaml")
    wait_for_round(process, fresh / "run", 1)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    said = next(line for line in process.stderr if without_news(line))
    assert said == "stopping after this round; Ctrl-C again discards it\n"
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert (outcome.exit_code, outcome.out) == (4, "")
    [message] = outcome.err.splitlines()
    assert message.startswith(
        "the round under way is discarded, what was saved stands; go on with: dlora simulate "
    )
    resume(message)
    assert_as_if_uninterrupted(Path("run"), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=["Ctrl-C", "SIGUSR1"])
def test_a_signal_while_loading_ends_at_once_and_the_same_command_starts_anew(
    number: signal.Signals, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """Field case 15: nothing is written yet, and libraries that are being imported cannot swallow
    the signal.
    """
    folder = furnish(tmp_path / "work", model_folder("bert"))
    process = start(folder, "simulate", "run.yaml")
    assert process.stderr is not None
    assert "starting" in process.stderr.readline()
    process.send_signal(number)
    outcome = finish(process)
    assert (outcome.exit_code, outcome.out) == (4, "")
    assert (
        outcome.err
        == "stopped before it began; nothing was written; start it again with: dlora simulate"
        " run.yaml\n"
    )
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_sigusr1_is_heard_as_sigterm_is(fresh: Path, whole: Path) -> None:
    """Field case 15: Slurm sends it before a job's end."""
    process = start(fresh, "simulate", "run.yaml")
    wait_for_round(process, fresh / "run", 0)
    process.send_signal(signal.SIGUSR1)
    outcome = finish(process)
    assert (
        outcome.exit_code == 4
        and "finished and saved; go on with: dlora simulate run.yaml --resume" in outcome.err
    )
    resume(outcome.err)
    assert_as_if_uninterrupted(Path("run"), whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(fresh: Path, whole: Path) -> None:
    process = start(fresh, "simulate", "run.yaml")
    wait_for_round(process, fresh / "run", 2)
    process.kill()
    assert finish(process) == Outcome(-signal.SIGKILL, "", "")
    # round 2 is lost
    assert [path.name for path in Path("run/checkpoints/dec-lora").iterdir()] == ["round-000002"]
    outcome = call("simulate", "run.yaml", "--resume")
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert_as_if_uninterrupted(Path("run"), whole)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "run.yaml"], "train.jsonl does not exist"),
        pytest.param(
            ["simulate", "run.yaml", "--dry-run"],
            "train.jsonl does not exist",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["peer", "run.yaml", "--name", "a", "--key", "k", "--federation", "f"],
            "peers.members is missing",
            marks=pytest.mark.slow,
        ),
        (
            [
                "peer",
                "run.yaml",
                "--name",
                "a",
                "--key",
                "k",
                "--federation",
                "f",
                "--set",
                "peers.members=[a,b]",
            ],
            "data.labels is missing",
        ),
        (
            ["device", "run.yaml", "--name", "a", "--key", "k", "--federation", "f"],
            "train.jsonl does not exist",
        ),
    ],
)
def test_what_the_config_tells_is_said_before_torch_is_loaded(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: none\ndata: {train: train.jsonl, eval: eval.jsonl}\n"
    )
    code = (
        "import sys\nfrom dlora import cli\ntry:\n    cli.main()\nfinally:\n    print('torch' in"
        " sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "False\n") and says in done.stderr


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
