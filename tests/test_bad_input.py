"""What a user gets wrong: exit code 2, one line that says what was asked, what came and what to do, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Outcome, assert_identical, call, change, contents, final_factors, finish, furnish, start

from dlora.programs.run_folder import RunFolder

ROWS = [json.dumps({"text": f"the film was {['bad', 'good'][index % 2]}", "label": index % 2}) for index in range(8)]
LOOKED_FOR = "peers.topology"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A folder with a config that works and its finished run; the tests damage copies."""
    folder = furnish(tmp_path_factory.mktemp("template") / "work", model_folder("bert"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome = call("simulate", "run.yaml")
    assert (outcome.exit_code, outcome.err) == (0, "")
    return folder


@pytest.fixture
def after_a_run(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a copy of the template, with the finished run in run/."""
    folder = shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def work(after_a_run: Path) -> Path:
    """The same before any run."""
    shutil.rmtree("run")
    return after_a_run


def write(files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def set_keys(changes: dict[str, Any]) -> None:
    tree = yaml.safe_load(Path("run.yaml").read_text())
    change(tree, changes)
    Path("run.yaml").write_text(yaml.safe_dump(tree))


def assert_refuses(says: list[str], *arguments: str) -> None:
    before = contents(Path())
    assert_one_line(call(*arguments), says)
    assert contents(Path()) == before


def assert_one_line(outcome: Outcome, says: list[str]) -> None:
    assert outcome.exit_code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.endswith("\n") and outcome.err.count("\n") == 1, outcome.err
    assert [part for part in says if part not in outcome.err] == [], outcome.err


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no-model": ({"model": None}, ["model", "None"]),
    "unknown-key": ({"peers.topologie": "ring"}, ["peers.topologie is not a key", "did you mean topology?"]),
    "unknown-section": ({"trian": {"rounds": 3}}, ["trian is not a key", "did you mean train?"]),
    "unknown-and-unlike": ({"peers.zzz": 1}, ["peers.zzz is not a key", "known here: count, topology"]),
    "unset-variable": (
        {"data.train": "${DLORA_TEST_UNSET}/train.tsv"},
        ["data.train", "${DLORA_TEST_UNSET}", "not set", "export DLORA_TEST_UNSET="],
    ),
    "a-word-for-a-number": ({"train.rounds": "many"}, ["train.rounds", "integer", "'many'"]),
    "no-rounds": ({"train.rounds": 0}, ["train.rounds", "1", "got 0"]),
    "rank-zero": ({"lora.r": 0}, ["lora.r", "greater than or equal to 1", "got 0"]),
    "negative-learning-rate": ({"train.learning_rate": -1.0}, ["train.learning_rate", "greater than 0", "-1.0"]),
    "learning-rate-not-a-number": ({"train.learning_rate": float("nan")}, ["train.learning_rate", "finite", "nan"]),
    "unknown-optimiser": ({"train.optimizer": "lion"}, ["train.optimizer", "'adamw' or 'sgd'", "'lion'"]),
    "steps-and-epochs": ({"train.local_epochs": 1}, ["local_steps and local_epochs", "keep one"]),
    "unknown-baseline": ({"compare": ["poold"]}, ["compare.0", "'pooled', 'local' or 'fedavg'", "'poold'"]),
    "a-baseline-twice": ({"compare": ["local", "local"]}, ["compare names a baseline twice"]),
    "a-baseline-without-list": ({"compare": "local"}, ["compare", "list", "'local'"]),
    "three-texts": ({"data.text": ["a", "b", "c"]}, ["data.text", "one column, or two for pairs", "['a', 'b', 'c']"]),
    "a-word-for-a-block": ({"peers.topology": "ring"}, ["peers.topology", "a block of keys", "'ring'"]),
    # data files
    "missing-file": ({"data.train": "trian.jsonl"}, ["trian.jsonl does not exist", "beside it lies train.jsonl"]),
    "missing-folder": ({"data.eval": "there/eval.jsonl"}, ["there/eval.jsonl does not exist", "nor does its folder"]),
    "a-folder-for-a-file": ({"data.train": "model"}, ["model is a folder", ".jsonl", ".parquet"]),
    "unknown-form": ({"data.train": "run.yaml"}, ["run.yaml is a .yaml file", ".jsonl", ".csv"]),
    "missing-column": ({"data.text": "txet"}, ["train.jsonl has no column txet", "text, label", "did you mean text?"]),
    "missing-label-column": ({"data.label": "lable"}, ["no column lable", "did you mean label?"]),
    "missing-second-text": ({"data.text": ["text", "premise"]}, ["train.jsonl has no column premise"]),
    "label-not-in-labels": ({"data.labels": ["0", "2"]}, ["train.jsonl row 2", "label '1'", "0, 2"]),
    "no-room-for-text": ({"data.max_length": 2}, ["data.max_length 2", "adds 2 tokens"]),
    "more-tokens-than-positions": ({"data.max_length": 1000}, ["data.max_length 1000", "512 tokens at most"]),
    # partitions
    "more-peers-than-rows": ({"peers.count": 65}, ["65 peers", "64 rows", "peers.count"]),
    "more-peers-than-limit": ({"data.limit": 3}, ["4 peers", "3 rows", "peers.count"]),
    "no-count": ({"peers.count": None}, ["iid does not say how many peers", "set peers.count"]),
    "empty-peer-by-size": ({"data.partition": {"sizes": [1, 1, 1, 1e9]}}, ["leaves peer-0 without rows", "sizes"]),
    "size-zero": ({"data.partition": {"sizes": [1, 1, 1, 0]}}, ["data.partition", "sizes", "above 0"]),
    "three-sizes": ({"data.partition": {"sizes": [1, 1, 1]}}, ["4 by peers.count", "3 by sizes", "make them equal"]),
    "dirichlet-without": ({"data.partition": {"kind": "dirichlet"}}, ["data.partition", "dirichlet needs concentration"]),
    "dirichlet-zero": (
        {"data.partition": {"kind": "dirichlet", "concentration": 0}},
        ["data.partition.concentration", "greater than 0", "got 0"],
    ),
    "dirichlet-too-few-rows": (
        {"data.partition": {"kind": "dirichlet", "concentration": 1, "min_rows": 17}},
        ["4 peers with min_rows 17 need 68 rows, there are 64", "lower peers.count or min_rows"],
    ),
    "dirichlet-too-skewed": (
        {"data.partition": {"kind": "dirichlet", "concentration": 0.01, "min_rows": 16}},
        ["concentration 0.01", "some peer of 4", "min_rows 16", "raise concentration"],
    ),
    "concentration-elsewhere": (
        {"data.partition": {"kind": "iid", "concentration": 1}},
        ["concentration belongs to kind dirichlet, not to iid", "remove it"],
    ),
    "shares-missing": ({"data.partition": {"kind": "label-shares"}}, ["label-shares needs shares"]),
    "shares-too-wide": (
        {"data.partition": {"kind": "label-shares", "shares": [[1, 0, 0]] * 4}},
        ["shares: row 0 has 3 entries", "2 labels"],
    ),
    "shares-for-others": (
        {"data.partition": {"kind": "label-shares", "shares": [[1, 0], [0, 1]]}},
        ["4 by peers.count", "2 by shares", "make them equal"],
    ),
    "shares-negative": (
        {"data.partition": {"kind": "label-shares", "shares": [[1, 1], [1, -1], [1, 1], [1, 1]]}},
        ["row 1 is [1.0, -1.0]", "no negatives"],
    ),
    "shares-of-nothing": (
        {"data.partition": {"kind": "label-shares", "shares": [[0, 0], [1, 1], [1, 1], [1, 1]]}},
        ["row 0 is [0.0, 0.0]", "a sum above 0"],
    ),
    "shares-leave-none": (
        {"data.partition": {"kind": "label-shares", "shares": [[1, 0]] * 4, "sizes": [1, 1, 1, 1e9]}},
        ["[32, 32] rows a label", "leave a peer without rows"],
    ),
    "no-such-client-column": (
        {"data.partition": {"kind": "by-column", "column": "who"}},
        ["train.jsonl has no column who", "text, label"],
    ),
    "fewer-clients-than-peers": (
        {"data.partition": {"kind": "by-column", "column": "label"}},
        ["4 peers asked for", "label has 2 values"],
    ),
    "files-without-names": ({"data.partition": {"kind": "files"}}, ["{peer: file}", "kind: files"]),
    "names-without-files": ({"data.train": {"a": "train.jsonl"}}, ["{peer: file}", "kind: files"]),
    "no-files": ({"data.train": {}, "data.partition": {"kind": "files"}}, ["train names no peer"]),
    "a-peer-that-is-no-folder": (
        {"data.train": {"a": "train.jsonl", "b/c": "eval.jsonl"}, "data.partition.kind": "files", "peers.count": 2},
        ["peer 'b/c' cannot name a folder"],
    ),
    "more-peers-than-files": (
        {"data.train": {"a": "train.jsonl", "b": "eval.jsonl"}, "data.partition.kind": "files"},
        ["peers.count is 4", "2 files"],
    ),
    "labels-of-causal-lm": (
        {"task": "causal-lm", "data.partition": {"kind": "dirichlet", "concentration": 1}},
        ["dirichlet needs labels", "causal-lm has none"],
    ),
    # topologies
    "disconnected": (
        {LOOKED_FOR: {"kind": "edges", "edges": [[0, 1], [2, 3]]}},
        ["not connected", "{peer-0, peer-1} | {peer-2, peer-3}"],
    ),
    "no-edges": ({LOOKED_FOR: {"kind": "edges", "edges": []}}, ["not connected", "{peer-0} | {peer-1}"]),
    "edge-to-nobody-by-index": (
        {LOOKED_FOR: {"kind": "edges", "edges": [[0, 1], [1, 9]]}},
        ["topology.edges[1] is [1, 9]", "no peer has index 9", "4 peers"],
    ),
    "edge-to-nobody-by-name": (
        {LOOKED_FOR: {"kind": "edges", "edges": [["peer-0", "pear-1"]]}},
        ["topology.edges[0] is [peer-0, pear-1]", "no peer is named pear-1", "did you mean peer-1?"],
    ),
    "edge-to-itself": ({LOOKED_FOR: {"kind": "edges", "edges": [[2, 2]]}}, ["[2, 2]", "not its own neighbour"]),
    "edge-of-three": ({LOOKED_FOR: {"kind": "edges", "edges": [[0, 1, 2]]}}, ["edges.0", "at most 2", "[0, 1, 2]"]),
    "no-such-topology": ({LOOKED_FOR: {"kind": "rign"}}, ["peers.topology.kind", "'ring'", "'base-k'", "'rign'"]),
    "erdos-renyi-without-p": ({LOOKED_FOR: {"kind": "erdos-renyi"}}, ["erdos-renyi needs p"]),
    "p-of-a-ring": ({LOOKED_FOR: {"kind": "ring", "p": 0.5}}, ["p belongs to kind erdos-renyi, not to ring"]),
    "erdos-renyi-too-thin": ({LOOKED_FOR: {"kind": "erdos-renyi", "p": 0.001}}, ["p 0.001", "4 peers", "take p well above"]),
    "hypercube-of-six": (
        {LOOKED_FOR: {"kind": "hypercube"}, "peers.count": 6},
        ["power of two", "6 peers", "take 4, 8", "base-k"],
    ),
    "weights-of-base-k": (
        {LOOKED_FOR: {"kind": "base-k"}, "peers.weights": "metropolis"},
        ["weights metropolis", "base-k fixes its weights", "remove"],
    ),
    "unknown-weights": ({"peers.weights": "laplace"}, ["peers.weights", "'metropolis' or 'laplacian'", "'laplace'"]),
    # models and their modules
    "no-such-model": ({"model": "./modle"}, ["model ./modle: no such folder", "pkg://"]),
    "a-file-for-a-model": ({"model": "run.yaml"}, ["model run.yaml", "config.json"]),
    "no-such-package": ({"model": "pkg://no_such_package/model"}, ["no_such_package is not installed", "pip install"]),
    "no-such-parent-package": ({"model": "pkg://no_such.package/model"}, ["no_such.package is not installed"]),
    "no-such-folder-in-package": ({"model": "pkg://yaml/model"}, ["package yaml has no folder model", "it holds"]),
    "target-matches-nothing": (
        {"lora.target_modules": ["query", "q_proj"]},
        ["lora.target_modules", "q_proj matches no module", "dense, key, query, value"],
    ),
    "regex-matches-nothing": ({"lora.target_modules": ".*q_proj"}, [".*q_proj matches no module", "dense, key"]),
    "no-regex": ({"lora.target_modules": "*query"}, ["*query is no regex", "nothing to repeat"]),
    "no-targets": ({"lora.target_modules": []}, ["lora.target_modules", "matches no module"]),
    "target-is-no-linear": ({"lora.target_modules": ["word_embeddings"]}, ["word_embeddings is no linear but Embedding"]),
    "no-such-device": ({"device": "warp"}, ["device warp", "take auto or cpu"]),
    # where it goes
    "output-dir-is-a-file": ({"output_dir": "train.jsonl"}, ["output_dir train.jsonl is a file", "--set output_dir="]),
    "output-dir-in-a-file": ({"output_dir": "train.jsonl/run"}, ["train.jsonl/run cannot be made", "Not a directory"]),
    "output-dir-of-others": ({"output_dir": "model"}, ["output_dir model holds files that are no run"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_run(name: str, work: Path) -> None:
    changes, says = CONFIGS[name]
    set_keys(changes)
    assert_refuses(says, "simulate", "run.yaml")


def rows_with(number: int, row: str) -> str:
    return "\n".join([*ROWS[: number - 1], row, *ROWS[number:]])


DATA: dict[str, tuple[dict[str, Any], dict[str, str | bytes], list[str]]] = {
    "row-is-not-json": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": rows_with(3, '{"text": oops')},
        ["bad.jsonl row 3 is not JSON", "one object a line"],
    ),
    "row-without-text": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": rows_with(4, '{"label": 1}')},
        ["bad.jsonl row 4 has no value for text"],
    ),
    "row-with-empty-text": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": rows_with(5, '{"text": " ", "label": 1}')},
        ["bad.jsonl row 5: text is empty"],
    ),
    "row-in-evaluation": (
        {"data.eval": "bad.jsonl"},
        {"bad.jsonl": rows_with(6, "[1, 2]")},
        ["bad.jsonl row 6 is a list", "expected an object"],
    ),
    "row-too-long": (
        {"data.train": "bad.csv"},
        {"bad.csv": "text,label\ngood,1\nbad,0,7\n"},
        ["bad.csv row 2 has 3 columns, expected 2"],
    ),
    "not-utf8": (
        {"data.train": "bad.tsv"},
        {"bad.tsv": b"text\tlabel\ngood\t1\nb\xe9d\t0\n"},
        ["bad.tsv line 3 is not UTF-8"],
    ),
    "not-gzip": ({"data.train": "bad.jsonl.gz"}, {"bad.jsonl.gz": "hello"}, ["bad.jsonl.gz cannot be read"]),
    "not-parquet": ({"data.train": "bad.parquet"}, {"bad.parquet": "hello"}, ["bad.parquet is not parquet"]),
    "no-rows": ({"data.train": "bad.jsonl"}, {"bad.jsonl": ""}, ["bad.jsonl is empty", "expected rows"]),
    "a-header-only": ({"data.train": "bad.csv"}, {"bad.csv": "text,label\n"}, ["bad.csv holds no rows"]),
    "unseen-label": (
        {"data.eval": "bad.jsonl"},
        {"bad.jsonl": rows_with(7, '{"text": "good", "label": 7}')},
        ["bad.jsonl row 7", "label '7' is not among those of training", "0, 1"],
    ),
    "half-a-label": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": rows_with(2, '{"text": "good", "label": 0.5}')},
        ["bad.jsonl row 2", "label is 0.5"],
    ),
    "one-class": (
        {"data.train": "bad.jsonl"},
        {"bad.jsonl": "\n".join(ROWS[::2])},
        ["every training row has the label '0'", "at least two"],
    ),
    "an-empty-file-for-a-peer": (
        {"data.train": {"a": "train.jsonl", "b": "bad.jsonl"}, "data.partition.kind": "files", "peers.count": None},
        {"bad.jsonl": "\n"},
        ["bad.jsonl is empty"],
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_read(name: str, work: Path) -> None:
    changes, files, says = DATA[name]
    write(files)
    set_keys(changes)
    assert_refuses(says, "simulate", "run.yaml")


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "no-such-config": (["simulate", "rnu.yaml"], ["config rnu.yaml cannot be read", "No such file", "YAML"]),
    "config-is-a-folder": (["simulate", "model"], ["config model cannot be read", "directory"]),
    "config-is-no-yaml": (["simulate", "bad.yaml"], ["config bad.yaml is not YAML", "line 1"]),
    "config-is-a-list": (["simulate", "list.yaml"], ["config list.yaml holds a list", "keys such as model"]),
    "config-is-empty": (["simulate", "empty.yaml"], ["config empty.yaml holds nothing"]),
    "config-is-binary": (["simulate", "latin.yaml"], ["config latin.yaml cannot be read", "not UTF-8"]),
    "set-without-value": (["simulate", "run.yaml", "--set", "train.rounds"], ["--set train.rounds", "key=value"]),
    "set-a-typo": (["simulate", "run.yaml", "--set", "trian.rounds=3"], ["trian is not a key", "did you mean train?"]),
    "set-below-a-value": (["simulate", "run.yaml", "--set", "model.x=3"], ["--set model.x=3", "model is a value"]),
    "set-half-a-list": (["simulate", "run.yaml", "--set", "compare=[local"], ["compare=[local", "not YAML"]),
    "resume-nothing": (["simulate", "run.yaml", "--resume"], ["run holds no run", "without --resume"]),
    "dry-resume": (["simulate", "run.yaml", "--resume", "--dry-run"], ["--dry-run and --resume", "one of them"]),
    "eval-nothing": (["eval", "rnu"], ["rnu holds no run", "give the folder of a run"]),
    "eval-no-run": (["eval", "model"], ["model holds no run"]),
    "report-nothing": (["report", "rnu"], ["rnu", "cannot be read", "give the folder of a run"]),
    "no-such-command": (["simulat", "run.yaml"], ["No such command 'simulat'", "'simulate'"]),
    "no-such-option": (["simulate", "run.yaml", "--resum"], ["No such option: --resum", "--resume"]),
    "no-config": (["simulate"], ["Missing argument 'CONFIG'"]),
    "topology-typo": (["topology", "rign"], ["'ring'", "'base-k'", "'rign'"]),
    "topology-hypercube-of-six": (["topology", "hypercube", "-n", "6"], ["power of two", "6 peers", "base-k"]),
    "topology-of-nobody": (["topology", "ring", "-n", "0"], ["--peers", "1"]),
    "topology-weights-of-base-k": (["topology", "base-k", "--weights", "laplacian"], ["base-k fixes its weights"]),
    "topology-no-such-weights": (["topology", "ring", "--weights", "x"], ["weights x", "metropolis, laplacian"]),
    "topology-p-of-a-ring": (["topology", "ring", "--p", "0.5"], ["p belongs to kind erdos-renyi, not to ring"]),
    "topology-drawn-nowhere": (["topology", "ring", "-o", "there/ring.svg"], ["there/ring.svg cannot be written"]),
    "topology-drawn-over-a-folder": (["topology", "ring", "-o", "model"], ["model cannot be written", "directory"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_cannot_be_meant(name: str, work: Path) -> None:
    write({"bad.yaml": "model: [a\n", "list.yaml": "- model\n", "empty.yaml": "", "latin.yaml": b"model: m\xe9\n"})
    arguments, says = COMMANDS[name]
    assert_refuses(says, *arguments)


def cut(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def widen() -> None:
    tree = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**tree, "intermediate_size": 64}))


MODELS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "without-weights": (lambda: Path("model/model.safetensors").unlink(), ["model.safetensors", "weights"]),
    "half-the-weights": (lambda: cut("model/model.safetensors"), ["model model", "weights"]),
    "other-weights": (widen, ["no fitting weights for", "intermediate.dense"]),
    "without-tokenizer": (
        lambda: [file.unlink() for file in Path("model").glob("tok*")],
        ["holds no tokenizer", "tokenizer.json"],
    ),
    "half-a-tokenizer": (lambda: cut("model/tokenizer.json"), ["tokenizer", "model"]),
    "half-a-config": (lambda: cut("model/config.json"), ["config.json"]),
    "unknown-architecture": (
        lambda: Path("model/config.json").write_text('{"model_type": "no-such"}'),
        ["model model", "no-such"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_that_is_damaged(name: str, work: Path) -> None:
    damage, says = MODELS[name]
    damage()
    assert_refuses(says, "simulate", "run.yaml")


def test_the_head_of_another_task_makes_room(work: Path) -> None:
    """Not every difference is damage: a classifier of three labels is a body for one of two."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained("model", num_labels=3)
    model.save_pretrained("model")
    assert call("simulate", "run.yaml", "--set", "train.rounds=1").exit_code == 0


RESUMES: dict[str, tuple[list[str], list[str]]] = {
    "rank": (["lora.r=8"], ["resume: lora.r was 4 and is 8", "put it back", "output_dir"]),
    "topology": (["peers.topology.kind=complete"], ["peers.topology.kind was ring and is complete"]),
    "null": (["train.max_grad_norm=null"], ["train.max_grad_norm was 1.0 and is null"]),
    "list": (["compare=[local]"], ['compare was [] and is ["local"]']),
    "seed": (["seed=1"], ["seed was 0 and is 1"]),
    "fewer-rounds": (["train.rounds=2"], ["train.rounds was 3 and is 2"]),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_names_the_key_that_changed(name: str, after_a_run: Path) -> None:
    overrides, says = RESUMES[name]
    assert_refuses(says, "simulate", "run.yaml", "--resume", *(part for key in overrides for part in ("--set", key)))


def test_a_longer_run_under_a_falling_learning_rate_is_another_run(work: Path) -> None:
    set_keys({"train.lr_scheduler_type": "linear", "train.rounds": 1})
    assert call("simulate", "run.yaml").exit_code == 0
    says = ["train.rounds was 1 and is 2", "linear", "start anew"]
    assert_refuses(says, "simulate", "run.yaml", "--resume", "--set", "train.rounds=2")


def test_a_resumed_run_notices_another_model_of_the_same_name(after_a_run: Path, model_folder: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file("model/model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, "model/model.safetensors", {"format": "pt"})
    assert_refuses(["resume: the model of manifest.json was "], "simulate", "run.yaml", "--resume")


def test_the_output_folder_of_another_run_stays_as_it_is(after_a_run: Path) -> None:
    assert_refuses(["output_dir run holds another run", "--set output_dir=", "--resume"], "simulate", "run.yaml")
    assert_refuses(["output_dir run holds another run"], "simulate", "run.yaml", "--dry-run")


RUNS: dict[str, tuple[Callable[[], object], list[str], list[str]]] = {
    "config": (lambda: cut("run/config.yaml"), ["simulate", "run.yaml", "--resume"], ["run/config.yaml"]),
    "manifest": (lambda: cut("run/manifest.json"), ["simulate", "run.yaml", "--resume"], ["run/manifest.json"]),
    "manifest-eval": (lambda: cut("run/manifest.json"), ["eval", "run"], ["manifest.json cannot be read"]),
    "factors": (
        lambda: cut("run/checkpoints/dec-lora/round-000003/factors.safetensors"),
        ["simulate", "run.yaml", "--resume"],
        ["round-000003 cannot be read"],
    ),
    "result": (
        lambda: cut("run/checkpoints/dec-lora/round-000003/result.json"),
        ["simulate", "run.yaml", "--resume"],
        ["round-000003 cannot be read"],
    ),
    "log": (
        lambda: Path("run/log.jsonl").write_bytes(Path("run/log.jsonl").read_bytes().splitlines(keepends=True)[0]),
        ["simulate", "run.yaml", "--resume"],
        ["run/log.jsonl holds", "the checkpoint was made at"],
    ),
    "log-report": (lambda: write({"run/log.jsonl": "hello\n"}), ["report", "run"], ["log.jsonl, line 1", "'hello'"]),
    "adapter": (lambda: cut("run/consensus/adapter_model.safetensors"), ["eval", "run"], ["consensus"]),
    "adapters": (lambda: shutil.rmtree("run/consensus"), ["eval", "run"], ["no adapters yet", "--resume"]),
    "eval-data": (lambda: None, ["eval", "run", "--data", "eval.json"], ["eval.json does not exist", "eval.jsonl"]),
    "eval-column": (
        lambda: write({"other.jsonl": '{"sentence": "good", "label": 1}'}),
        ["eval", "run", "--data", "other.jsonl"],
        ["other.jsonl has no column text"],
    ),
    "eval-label": (
        lambda: write({"other.jsonl": '{"text": "good", "label": 5}'}),
        ["eval", "run", "--data", "other.jsonl"],
        ["other.jsonl row 1", "label '5'", "0, 1"],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_folder_that_is_damaged(name: str, after_a_run: Path) -> None:
    damage, arguments, says = RUNS[name]
    damage()
    assert_refuses(says, *arguments)


def test_two_mistakes_are_two_lines(work: Path) -> None:
    set_keys({"lora.r": 0, "train.rounds": 0})
    outcome = call("simulate", "run.yaml")
    lines = outcome.err.splitlines()
    assert outcome.exit_code == 2
    assert [line.split()[:2] for line in lines] == [["error:", "lora.r:"], ["error:", "train.rounds:"]]


@pytest.mark.parametrize("name", ["no-such-config", "more-peers-than-rows", "edge-to-nobody-by-name"])
def test_a_real_process_says_the_same(name: str, work: Path) -> None:
    """Nothing of the libraries below comes through, whatever they print when they are imported."""
    if name in CONFIGS:
        changes, says = CONFIGS[name]
        arguments = ["simulate", "run.yaml"]
        set_keys(changes)
    else:
        arguments, says = COMMANDS[name]
    before = contents(work)
    assert_one_line(finish(start(work, *arguments)), says)
    assert contents(work) == before


class Disk:
    """A file system of its own, in memory, that can be full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, size_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size_bytes}", self.path], check=True, capture_output=True)

    def fill(self) -> Path:
        filler = self.path / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return filler


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)  # lazy: tensors may still map the files of a checkpoint


def test_a_full_disk_at_the_start_leaves_nothing(disk: Disk, work: Path) -> None:
    filler = disk.fill()
    before = contents(disk.path)
    arguments = ["simulate", "run.yaml", "--set", f"output_dir={disk.path}/runs/run"]
    assert_refuses([f"output_dir {disk.path}/runs/run cannot be made", "No space left"], *arguments)
    assert contents(disk.path) == before
    filler.unlink()
    disk.resize(50_000_000)
    assert call(*arguments).exit_code == 0


@pytest.mark.parametrize(("checkpoints", "saved"), [(0.1, 0), (0.5, 0), (1.1, 1), (1.7, 1)])
def test_a_disk_that_fills_during_the_run_keeps_the_last_checkpoint(
    disk: Disk, after_a_run: Path, checkpoints: float, saved: int
) -> None:
    """There is room for so many checkpoints; with space, --resume gives the factors of the run that always had it."""
    [checkpoint] = Path("run/checkpoints/dec-lora").iterdir()
    size_bytes = sum(file.stat().st_size for file in checkpoint.iterdir())
    disk.resize(int(checkpoints * size_bytes) + 40_000)
    run = disk.path / "run"
    arguments = ["simulate", "run.yaml", "--set", f"output_dir={run}"]
    says = ["no space left on device", str(run), "free some", "--resume"]
    assert_one_line(call(*arguments), says)
    assert [path.name for path in run.glob("checkpoints/dec-lora/*")] == ["round-000001"] * saved
    stored = RunFolder(run).latest("dec-lora")
    assert (stored.rounds_done if stored else 0) == saved

    assert_one_line(call(*arguments, "--resume"), says)  # still full
    disk.resize(50_000_000)
    resumed = call(*arguments, "--resume")
    assert (resumed.exit_code, resumed.err) == (0, "")
    assert_identical(final_factors(run), final_factors(Path("run")))
    assert [str(path) for path in run.rglob(".*")] == []
