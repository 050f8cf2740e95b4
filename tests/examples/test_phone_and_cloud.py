"""The example of a cloud and two devices runs as it is shipped, and its tutorial speaks of what
exists.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from dlora.cli import app
from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from kit.run_example import needs_texts, run_example

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "phone-and-cloud"
TUTORIAL = ROOT / "docs" / "split.md"
DEVICES = ("phone", "tablet")


def blocks(language: str) -> list[str]:
    """The tutorial's code blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```",
        TUTORIAL.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )


@pytest.mark.slow  # 6 minutes on two busy cores, most of it starts of Python with torch
@pytest.mark.timeout(900)
@needs_texts
def test_both_devices_end_where_training_without_a_cloud_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = ["train.rounds=2", "train.local_steps=1", "data.limit=40", "data.eval_limit=40"]
    out = run_example(EXAMPLE, folder, changes, 800)
    for name in DEVICES:
        assert f" {name} " in out
        assert (folder / name / "report.html").exists()
        run = json.loads((folder / name / "summary.json").read_text())["runs"]["dlora"]
        alone = json.loads((folder / "without-cloud" / name / "summary.json").read_text())["runs"][
            "dec-lora"
        ]
        loss = alone["consensus"]["loss"]
        assert run["consensus"]["loss"] == pytest.approx(
            loss, rel={"phone": 1e-5, "tablet": 1e-2}[name]
        )
        planned = json.loads((folder / f"{name}.plan.json").read_text())["cloud"]["cloud_bytes"]
        assert run["cloud_bytes"] == pytest.approx(planned, rel=0.02)
    assert re.search(r"^served .* 0 links refused$", out, re.MULTILINE)


def test_the_examples_configs_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_DATA", "somewhere")
    cloud = CloudConfig.load(EXAMPLE / "cloud.yaml")
    for name in DEVICES:
        config = Config.load(EXAMPLE / f"{name}.yaml")
        assert config.split is not None and config.model == cloud.model
        assert (
            config.data.labels
            and config.data.max_length * config.train.per_device_train_batch_size
            <= cloud.limits.max_tokens
        )


def test_the_tutorials_configs_are_valid(tmp_path: Path) -> None:
    cloud, device = (tmp_path / "cloud.yaml", tmp_path / "run.yaml")
    for path, text in zip((cloud, device), blocks("yaml"), strict=True):
        path.write_text(text)
    assert CloudConfig.load(cloud).model == Config.load(device).model
    assert "split" in yaml.safe_load(device.read_text())


def test_the_tutorials_python_is_python() -> None:
    found = blocks("python")
    assert len(found) >= 2
    for number, text in enumerate(found):
        compile(text, f"split.md, python {number}", "exec")


def test_the_tutorial_names_options_that_exist() -> None:
    group = typer.main.get_command(app)
    text = "\n".join([*blocks("console"), *blocks("ini")]).replace("\\\n", " ")
    found = [
        shlex.split(line, comments=True)
        for line in re.findall(r"(?:^\$ |/)(dlora [a-z].*)$", text, re.MULTILINE)
    ]
    assert len(found) >= 8
    for words in found:
        words = words[: words.index(">")] if ">" in words else words
        command, rest = group, words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]  # type: ignore[attr-defined]
        assert command is not group and not hasattr(command, "commands"), (
            f"no such command: {' '.join(words)}"
        )
        known = {option for parameter in command.params for option in parameter.opts}
        unknown = [word for word in rest if word.startswith("-") and word not in known]
        assert not unknown, f"{' '.join(words)}: {unknown} not among {sorted(known)}"
        changes = [rest[place + 1] for place, word in enumerate(rest) if word == "--set"]
        sections = (CloudConfig if rest and words[1] == "cloud" else Config).model_fields
        assert all(change.partition("=")[0].partition(".")[0] in sections for change in changes), (
            " ".join(words)
        )


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
def test_the_service_file_is_one_that_systemd_takes(tmp_path: Path) -> None:
    [unit] = blocks("ini")
    path = tmp_path / "dlora-cloud.service"
    # the program need not exist here
    path.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/sh", unit, flags=re.MULTILINE))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True
    )
    said = [line for line in verified.stderr.splitlines() if "dlora-cloud.service" in line]
    assert (verified.returncode, said) == (0, []), verified.stderr


def test_every_message_the_tutorial_explains_is_one_of_ours() -> None:
    """The troubleshooting names messages by their words; each stands in the source, less its
    figures and names.
    """
    source = " ".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "src" / "dlora").rglob("*.py"))
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    table = TUTORIAL.read_text(encoding="utf-8").partition("## When it says")[2]
    messages = re.findall(r"^\| `(.*?)`", table, re.MULTILINE)
    assert len(messages) >= 8
    for message in messages:
        for words in message.split("…"):
            assert words.strip() in source, f"{words.strip()!r} of {message!r} is said nowhere"
