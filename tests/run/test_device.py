"""Law 5 of the split: a real device through a real cloud over TLS ends where `simulate` ends; and
what is refused before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config
from kit import tiny_models
from kit.call_cli import call, change, contents
from kit.processes import Split, running
from kit.serving_cloud import Members, Serving, serving
from kit.updates import UPDATE_BOUND, assert_same, relative_difference, update_of

pytestmark = pytest.mark.usefixtures("no_page")

ModelFolder = Callable[..., Path]
WIRE_BOUND = 1e-5  # of two runs over the same wire
FRAME = "frame.safetensors"

# The device's own changes to the config.
DEVICES: dict[str, dict[str, Any]] = {
    "phone": {},
    "tablet": {
        "split.wire": "bfloat16", "seed": 1, "lora.target_modules": ["query", "value"],
        "train.local_steps": 3,
        "lora.lora_dropout": 0.1, "train.model_dropout": 0.1, "lora.use_rslora": True,
    },
    "watch": {
        "split.wire": "int8", "seed": 2, "lora.r": 2, "lora.train_head": False, "split.pipeline": 2,
        "lora.rank_pattern": {"query": 3}, "lora.alpha_pattern": {"0.*.value": 1.0},
        "schedule": {"kind": "kr", "active_fraction": 0.4, "period": 2, "warmup_steps": 3},
    },
    "ring": {"lora.placement": "core", "split.wire": "bfloat16", "seed": 3},
}  # fmt: skip


class Devices(Split):
    """Each with a config of its own."""

    def config(self, name: str, changes: Mapping[str, Any] | None = None) -> Config:
        frame = {"lora.frame": str(self.folder / FRAME)} if name == "ring" else {}
        return super().config(name, {**DEVICES[name], **frame, **(changes or {})})


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder
) -> Iterator[Devices]:
    """All devices at once, through one cloud, which makes the frame for the one with cores."""
    folder = tmp_path_factory.mktemp("together")
    frame = {"core": {"r": 4, "frame": str(folder / FRAME)}}
    split = Devices(folder, model_folder("bert"), devices=tuple(DEVICES), cloud=frame)
    with running(split):
        split.start_hub()
        for name in DEVICES:
            split.start(name)
        for name in DEVICES:
            outcome = split.finish(name)
            assert (outcome.exit_code, outcome.err) == (0, ""), outcome
        yield split


def simulated(devices: Split, name: str, **changes: Any) -> Path:
    """The folder of `simulate` with the device's config."""
    config = devices.config(
        name, {"output_dir": str(devices.folder / f"{name}-{len(changes)}"), **changes}
    )
    dlora.simulate(config)
    return Path(config.output_dir)


@pytest.mark.slow
def test_a_device_ends_where_a_run_without_any_cloud_ends(together: Devices) -> None:
    alone = simulated(together, "phone", split=None)
    config = together.config("phone")
    update, reference = (
        update_of(config, run / "consensus") for run in (together.run("phone"), alone)
    )
    parts = {
        part: relative_difference(update, reference, part)
        for part in ("lora_A", "lora_B", "classifier")
    }
    print(", ".join(f"{part} {off:.1e}" for part, off in parts.items()))
    assert_same(update, reference, UPDATE_BOUND["adamw"], "classification")


@pytest.mark.slow
def test_a_device_of_cores_exports_pairs_in_the_clouds_frame(together: Devices) -> None:
    frame, pairs = (
        load_file(together.folder / FRAME),
        load_file(together.run("ring") / "consensus/adapter_model.safetensors"),
    )
    for name, tensor in pairs.items():
        if name.endswith("lora_A.weight"):
            assert torch.equal(tensor, frame[name.split("bert.", 1)[1].removesuffix(".weight")])


@pytest.mark.slow
def test_a_scheduled_device_says_what_it_saved(together: Devices) -> None:
    run = together.summary("watch")["runs"]["dlora"]
    assert 0 < run["adapter_fraction"] < 0.5 and 0 < run["device_flops_fraction"] < 0.5
    epochs = [event["epoch"] for event in together.events("watch", "active")]
    assert epochs == list(range(len(epochs))) and len(epochs) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_a_device_ends_where_its_simulation_with_both_halves_ends(
    together: Devices, name: str
) -> None:
    """Whoever else the cloud serves."""
    file = "consensus/adapter_model.safetensors"
    ours, theirs = (
        load_file(run / file) for run in (together.run(name), simulated(together, name))
    )
    assert ours.keys() == theirs.keys()
    off = {part: relative_difference(ours, theirs, part) for part in ("lora_A", "lora_B")}
    print(name, off)
    assert max(off.values()) < WIRE_BOUND


# What is refused


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("members"))


def typed(
    members: Members, folder: Path, model: Path, name: str, changes: Mapping[str, Any]
) -> list[str]:
    """A run in ``folder``, and what is typed to start it."""
    tree: dict[str, Any] = {
        "model": str(model),
        "device": "cpu",
        "data": {
            "train": str(tiny_models.write_rows(folder / "train.jsonl", 16)),
            "eval": str(tiny_models.write_rows(folder / "eval.jsonl", 16, start=64)),
            "labels": ["0", "1"],
            "max_length": 16,
        },
        "split": {"cloud": "hub"},
        "output_dir": str(folder / "deep" / "run"),
    }
    change(tree, changes)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    key = members.key(name) if members.key(name).exists() else members.key("phone")
    return [
        "device",
        str(folder / "run.yaml"),
        "--name",
        name,
        "--key",
        str(key),
        "--federation",
        str(members.federation),
    ]


# Who; changes to the config; what is said.
MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "cloud-misspelt": (
        "phone",
        {"split.cloud": "hbu"},
        "split.cloud hbu is not in .*; did you mean hub",
    ),
    "cloud-unknown": (
        "phone",
        {"split.cloud": "zzz"},
        "split.cloud zzz is not in .*; it lists attic, hub, north, phone, tablet",
    ),
    "cloud-is-a-peer": (
        "phone",
        {"split.cloud": "north"},
        "split.cloud north is a peer in .*; name a cloud",
    ),
    "cloud-without-address": (
        "phone",
        {"split.cloud": "attic"},
        "split.cloud attic is a cloud without an address in .*",
    ),
    "no-split": ("phone", {"split": None}, "split is missing; .* such as split: {cloud: hub}"),
    "no-device": (
        "north",
        {},
        "north is a peer in .*; a device needs its own name: dlora identity new NAME",
    ),
    "misspelt": ("phnoe", {}, "phnoe is not a member in .*did you mean phone"),
    "key-of-another": ("tablet", {}, ".*tablet.*phone.*"),
    "compares": (
        "phone",
        {"compare": ["local"]},
        "compare needs everybody's data in one place; remove it",
    ),
    "members": (
        "phone",
        {"peers": {"members": ["phone", "tablet"]}},
        "phone and tablet are neighbours but neither has an address",
    ),
    "no-target": (
        "phone",
        {"lora": {"target_modules": ["qeury"]}},
        "lora.target_modules: qeury matches no module",
    ),
    "no-file": ("phone", {"data.train": "no-such.jsonl"}, ".*no-such.jsonl"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_is_dialled(
    mistake: str, members: Members, model_folder: ModelFolder, tmp_path: Path
) -> None:
    name, changes, says = MISTAKES[mistake]
    arguments = typed(members, tmp_path, model_folder("bert"), name, changes)
    if mistake == "key-of-another":
        arguments[5] = str(members.key("phone"))
    before = contents(tmp_path)
    outcome = call(*arguments)
    assert (outcome.exit_code, outcome.out) == (2, ""), outcome
    assert re.match(f"error: {says}", outcome.err) and outcome.err.count("\n") == 1, outcome.err
    assert contents(tmp_path) == before


class Models(NamedTuple):
    """What devices may bring to a cloud that runs ``cloud``."""

    folder: Path
    cloud: Path

    def other(self, name: str, family: str = "bert", seed: int = 7, **shape: int) -> Path:
        """Like the cloud's but for what is said here; ``name`` of the folder."""
        config = tiny_models.config(family)
        config.update(shape)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = transformers.AutoModel.from_config(config)
        if name == "more-layers":
            whole = transformers.AutoModel.from_pretrained(self.cloud)
            network.embeddings.load_state_dict(whole.embeddings.state_dict())
        network.save_pretrained(self.folder / name)
        tiny_models.tokenizer().save_pretrained(self.folder / name)
        return self.folder / name


# The device's model; changes to its config; what is said. The cloud runs a tiny BERT and takes 8
# tokens at once.
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "family": ({"family": "roberta"}, {},
        "the cloud refuses this device: model: the device has roberta, the cloud bert"),
    "width": ({"hidden_size": 32}, {},
        "the cloud refuses this device: hidden_size: the device has 32, the cloud 64"),
    "vocabulary": ({"vocab_size": 24}, {},
        "the cloud refuses this device: vocabulary: the device has 24, the cloud 20"),
    "weights": ({"seed": 8}, {},
        "the cloud refuses this device: embedding: the device has .*, the cloud "),
    "more-layers": (
        {"num_hidden_layers": 3}, {"lora": {"target_modules": "all-linear"}},
        "the cloud refuses this device: .*layer.2.attention",
    ),
    "long-text": (
        {}, {},
        "a text of 9 tokens is more than the cloud takes, 8: lower data.max_length, or raise",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def small_cloud(members: Members, model_folder: ModelFolder) -> Iterator[Serving]:
    with serving(members, model_folder("bert"), {"limits.max_tokens": 8}) as served:
        yield served


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_device_says_why_and_leaves_nothing(
    refusal: str, members: Members, small_cloud: Serving, model_folder: ModelFolder, tmp_path: Path
) -> None:
    shape, changes, says = REFUSALS[refusal]
    (tmp_path / "models").mkdir()
    model = (
        Models(tmp_path / "models", model_folder("bert")).other(refusal, **shape)
        if shape
        else model_folder("bert")
    )
    arguments = typed(members, tmp_path, model, "phone", changes)
    before = contents(tmp_path)
    outcome = call(*arguments)
    assert (outcome.exit_code, outcome.out) == (3, ""), outcome
    assert re.match(f"error: {says}", outcome.err) and outcome.err.count("\n") == 1, outcome.err
    assert contents(tmp_path) == before
