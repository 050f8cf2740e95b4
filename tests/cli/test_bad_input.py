"""What a user gets wrong: exit code 2, one line that says what was asked, what came and what to do,
nothing written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dlora.config.cloud import CloudConfig
from dlora.errors import ConfigError
from kit.bad_configs import CLOUDS, CONFIGS
from kit.bad_inputs import COMMANDS, DATA
from kit.call_cli import call, contents, finish, start
from kit.refusals import assert_one_line, assert_refuses, set_keys, write


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_run(name: str, work: Path) -> None:
    changes, says = CONFIGS[name]
    set_keys(changes)
    assert_refuses(says, "simulate", "run.yaml")


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_config_that_cannot_run(name: str) -> None:
    changes, says = CLOUDS[name]
    with pytest.raises(ConfigError) as refusal:
        CloudConfig.parse({"model": "model"} | changes)
    message = str(refusal.value)
    assert "\n" not in message
    assert [part for part in says if part not in message] == [], message


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_read(name: str, work: Path) -> None:
    changes, files, says = DATA[name]
    write(files)
    set_keys(changes)
    assert_refuses(says, "simulate", "run.yaml")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_cannot_be_meant(name: str, work: Path) -> None:
    write(
        {
            "bad.yaml": "model: [a\n",
            "list.yaml": "- model\n",
            "empty.yaml": "",
            "latin.yaml": b"model: m\xe9\n",
        }
    )
    arguments, says = COMMANDS[name]
    assert_refuses(says, *arguments)


def cut(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def take_tokenizer() -> None:
    for file in Path("model").glob("tok*"):
        file.unlink()


def cut_both(name: str) -> None:
    """In both checkpoints that the run keeps."""
    for number in (2, 3):
        cut(f"run/checkpoints/dec-lora/round-00000{number}/{name}")


def widen() -> None:
    tree = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**tree, "intermediate_size": 64}))


MODELS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "without-weights": (
        lambda: Path("model/model.safetensors").unlink(),
        ["model.safetensors", "weights"],
    ),
    "half-the-weights": (lambda: cut("model/model.safetensors"), ["model model", "weights"]),
    "other-weights": (widen, ["no fitting weights for", "intermediate.dense"]),
    "without-tokenizer": (take_tokenizer, ["holds no tokenizer", "tokenizer.json"]),
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
    "topology": (
        ["peers.topology.kind=complete"],
        ["peers.topology.kind was ring and is complete"],
    ),
    "null": (["train.max_grad_norm=null"], ["train.max_grad_norm was 1.0 and is null"]),
    "list": (["compare=[local]"], ['compare was [] and is ["local"]']),
    "seed": (["seed=1"], ["seed was 0 and is 1"]),
    "fewer-rounds": (["train.rounds=2"], ["train.rounds was 3 and is 2"]),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_names_the_key_that_changed(name: str, after_a_run: Path) -> None:
    overrides, says = RESUMES[name]
    assert_refuses(
        says,
        "simulate",
        "run.yaml",
        "--resume",
        *(part for key in overrides for part in ("--set", key)),
    )


def test_a_longer_run_under_a_falling_learning_rate_is_another_run(work: Path) -> None:
    set_keys({"train.lr_scheduler_type": "linear", "train.rounds": 1})
    assert call("simulate", "run.yaml").exit_code == 0
    says = ["train.rounds was 1 and is 2", "linear", "start anew"]
    assert_refuses(says, "simulate", "run.yaml", "--resume", "--set", "train.rounds=2")


def test_a_resumed_run_notices_another_model_of_the_same_name(
    after_a_run: Path, model_folder: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file("model/model.safetensors")
    save_file(
        {name: 2 * tensor for name, tensor in weights.items()},
        "model/model.safetensors",
        {"format": "pt"},
    )
    assert_refuses(["resume: the model of manifest.json was "], "simulate", "run.yaml", "--resume")


def test_the_output_folder_of_another_run_stays_as_it_is(after_a_run: Path) -> None:
    again = ["simulate", "run.yaml"]
    assert_refuses(
        ["output_dir run holds this run", "--set output_dir=", "go on with --resume"], *again
    )
    assert_refuses(
        ["output_dir run holds another run", "--set output_dir=", "config.yaml"],
        *again,
        "--set",
        "seed=1",
    )
    before = contents(Path())
    # it writes nothing, and so has nothing to refuse
    outcome = call("simulate", "run.yaml", "--dry-run")
    assert (outcome.exit_code, contents(Path())) == (0, before)
    assert "run holds this run already" in outcome.out


RUNS: dict[str, tuple[Callable[[], object], list[str], list[str]]] = {
    "config": (
        lambda: write(
            {"run/config.yaml": Path("run/config.yaml").read_text().partition("  eval:")[0]}
        ),
        ["simulate", "run.yaml", "--resume"],
        ["run/config.yaml", "data.eval is missing"],
    ),
    "manifest": (
        lambda: cut("run/manifest.json"),
        ["simulate", "run.yaml", "--resume"],
        ["run/manifest.json"],
    ),
    "manifest-eval": (
        lambda: cut("run/manifest.json"),
        ["eval", "run"],
        ["manifest.json cannot be read"],
    ),
    "factors": (
        lambda: cut_both("factors.safetensors"),
        ["simulate", "run.yaml", "--resume"],
        ["round-000003 cannot be read", "round-000002 cannot be read", "start anew"],
    ),
    "state": (
        lambda: cut_both("state.json"),
        ["simulate", "run.yaml", "--resume"],
        ["round-000003 cannot be read", "round-000002 cannot be read"],
    ),
    "log": (
        lambda: Path("run/log.jsonl").write_bytes(
            Path("run/log.jsonl").read_bytes().splitlines(keepends=True)[0]
        ),
        ["simulate", "run.yaml", "--resume"],
        ["run/log.jsonl holds", "the checkpoint was made at"],
    ),
    "log-report": (
        lambda: write({"run/log.jsonl": "hello\n"}),
        ["report", "run"],
        ["log.jsonl, line 1", "'hello'"],
    ),
    "adapter": (
        lambda: cut("run/consensus/adapter_model.safetensors"),
        ["eval", "run"],
        ["consensus"],
    ),
    "adapters": (
        lambda: shutil.rmtree("run/consensus"),
        ["eval", "run"],
        ["no adapters yet", "--resume"],
    ),
    "eval-data": (
        lambda: None,
        ["eval", "run", "--data", "eval.json"],
        ["eval.json does not exist", "eval.jsonl"],
    ),
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
    assert [line.split()[:2] for line in lines] == [
        ["error:", "lora.r:"],
        ["error:", "train.rounds:"],
    ]


@pytest.mark.parametrize(
    "name",
    ["no-such-config", pytest.param("edge-to-nobody-by-name", marks=pytest.mark.slow)],
)
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
