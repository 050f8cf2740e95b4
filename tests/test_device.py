"""Law 5 of the split: a real device through a real cloud over TLS ends where `simulate` ends; and what is refused before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from federation import Split, running
from safetensors.torch import load_file
from test_laws import UPDATE_BOUND, assert_same, relative_difference, update_of

import dlora

ModelFolder = Callable[..., Path]
WIRE_BOUND = 1e-5  # of two runs over the same wire

# The device's own changes to the config.
DEVICES = {
    "phone": {},
    "tablet": {
        "split.wire": "bfloat16", "seed": 1, "lora.target_modules": ["query", "value"], "train.local_steps": 3,
        "lora.lora_dropout": 0.1, "train.model_dropout": 0.1,
    },
    "watch": {"split.wire": "int8", "seed": 2, "lora.r": 2, "lora.train_head": False, "split.pipeline": 2},
}  # fmt: skip


class Devices(Split):
    """Each with a config of its own."""

    def config(self, name, changes=None):  # type: ignore[no-untyped-def]
        return super().config(name, {**DEVICES[name], **(changes or {})})


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, model_folder: ModelFolder) -> Iterator[Devices]:
    """Three devices at once, through one cloud."""
    split = Devices(tmp_path_factory.mktemp("together"), model_folder("bert"), devices=tuple(DEVICES))
    with running(split):
        split.start_hub()
        for name in DEVICES:
            split.start(name)
        for name in DEVICES:
            outcome = split.finish(name)
            assert (outcome.exit_code, outcome.err) == (0, ""), outcome
        yield split


def simulated(devices: Split, name: str, **changes: object) -> Path:
    """The folder of `simulate` with the device's config."""
    config = devices.config(name, {"output_dir": str(devices.folder / f"{name}-{len(changes)}"), **changes})
    dlora.simulate(config)
    return Path(config.output_dir)


def test_a_device_ends_where_a_run_without_any_cloud_ends(together: Devices) -> None:
    alone = simulated(together, "phone", split=None)
    config = together.config("phone")
    update, reference = (update_of(config, run / "consensus") for run in (together.run("phone"), alone))
    parts = {part: relative_difference(update, reference, part) for part in ("lora_A", "lora_B", "classifier")}
    print(", ".join(f"{part} {off:.1e}" for part, off in parts.items()))
    assert_same(update, reference, UPDATE_BOUND["adamw"], "classification")


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_ends_where_its_simulation_with_both_halves_ends(together: Devices, name: str) -> None:
    """Whoever else the cloud serves."""
    file = "consensus/adapter_model.safetensors"
    ours, theirs = (load_file(run / file) for run in (together.run(name), simulated(together, name)))
    assert ours.keys() == theirs.keys()
    off = {part: relative_difference(ours, theirs, part) for part in ("lora_A", "lora_B")}
    print(name, off)
    assert max(off.values()) < WIRE_BOUND
