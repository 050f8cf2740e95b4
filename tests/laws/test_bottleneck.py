"""Laws 1 and 2 for bottleneck adapters: the oracle is nn.Linear in forward hooks, because PEFT
has no bottleneck adapters; and what is written loads elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.errors import ConfigError, ModelError
from dlora.events.log import read_log
from dlora.run.prepare import prepare
from kit.bottlenecks import BOTTLENECK, Hooked, assert_same, outputs, update_in
from kit.cards import loaded_by_card
from kit.updates import GOES_ON, LOSS_BOUND, UPDATE_BOUND

pytestmark = pytest.mark.usefixtures("no_page")

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(
    ("family", "task", "optimizer", "activation"),
    [
        ("bert", "classification", "adamw", "gelu"),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [
                ("bert", "classification", "sgd", "relu"),
                ("roberta", "classification", "adamw", "silu"),
                ("llama", "causal-lm", "adamw", "gelu"),
                ("llama", "classification", "sgd", "silu"),
                ("opt", "classification", "adamw", "relu"),
                ("gpt2", "causal-lm", "sgd", "gelu"),
                ("gpt2", "classification", "adamw", "gelu"),
            ]
        ),
    ],
)
def test_one_participant_is_the_written_out_adapter(
    make_config: MakeConfig, family: str, task: str, optimizer: str, activation: str
) -> None:
    """Law 1, and the folder gives the printed score by the code on its card."""
    config = make_config(
        family, task, **{
            "peers.count": 1, "train.rounds": 50, "train.local_steps": 1, "eval_every": 0,
            "train.optimizer": optimizer, "train.weight_decay": 0.01,
            "train.learning_rate": 5e-3 if optimizer == "adamw" else 0.1,
            "train.lr_scheduler_type": "linear", "train.warmup_steps": 5,
            "lora": {}, "bottleneck": {"r": 4, "activation": activation},
        },
    )  # fmt: skip
    summary = dlora.simulate(config)
    prepared = prepare(config)
    hooked = Hooked(config, outputs(family))
    losses = hooked.train(config, prepared, 0)
    ours = [
        event["loss"]
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "round"
    ]
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < LOSS_BOUND
    assert losses[-1] < losses[0] - 0.01  # it learned something
    folder = Path(config.output_dir, "consensus")
    assert_same(update_in(folder, hooked), hooked.update(), UPDATE_BOUND[optimizer])
    printed = summary["runs"]["dec-lora"]["consensus"]["loss"]
    assert dlora.score(config.output_dir)["consensus"]["loss"] == pytest.approx(printed, abs=1e-6)
    assert loss_by_card(config, folder) == pytest.approx(printed, abs=1e-5)


def loss_by_card(config: Config, folder: Path) -> float:
    """The loss of an adapter that the code of its README.md has loaded."""
    model, prepared = loaded_by_card(config, folder), prepare(config)
    model.config.pad_token_id = prepared.pad_token_id
    rows = prepared.data.evaluation
    batch = collate(rows, prepared.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
    else:
        labels = batch.labels
    return torch.nn.functional.cross_entropy(logits.float(), labels).item()


@pytest.mark.parametrize(
    ("family", "task"),
    [
        pytest.param("bert", "classification"),
        pytest.param("llama", "causal-lm", marks=pytest.mark.slow),
    ],
)
def test_stacked_participants_are_separate_runs(
    make_config: MakeConfig, family: str, task: str
) -> None:
    """Law 2: four stacked participants against four written-out runs over one peer's rows each."""
    config = make_config(
        family, task, **{
            "train.rounds": 12, "train.local_steps": 1, "eval_every": 0,
            "train.max_grad_norm": 0.1, "compare": ["local"], **BOTTLENECK,
        },
    )  # fmt: skip
    dlora.simulate(config)
    prepared = prepare(config)
    stacked = load_file(
        Path(config.output_dir, "checkpoints/local/round-000012/factors.safetensors")
    )
    for peer in range(4):
        hooked = Hooked(config, outputs(family))
        hooked.train(config, prepared, peer)
        ours = {name: stacked[name][peer] - value for name, value in hooked.initial.items()}
        assert_same(ours, hooked.update(), UPDATE_BOUND["adamw"])


def test_a_run_goes_on_from_an_adapter(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two runs of two rounds each, the second from the first one's average, are one run of four."""
    keys = {
        **GOES_ON,
        **BOTTLENECK,
    }

    def ended(name: str, rounds: int, **more: Any) -> dict[str, torch.Tensor]:
        config = make_config(
            **keys | more, **{"train.rounds": rounds}, output_dir=str(tmp_path / name)
        )
        printed = dlora.simulate(config)["runs"]["dec-lora"]["consensus"]["loss"]
        scored = dlora.score(config.output_dir)["consensus"]["loss"]
        assert scored == pytest.approx(printed, abs=1e-6)
        return load_file(tmp_path / name / "consensus" / "bottleneck.safetensors")

    whole, half = ended("whole", 4), ended("half", 2)
    begun = {"r": 4, "adapter": str(tmp_path / "half" / "consensus")}
    rest = ended("rest", 2, bottleneck=begun)
    assert (tmp_path / "rest" / "begun-from" / "bottleneck.safetensors").is_file()
    for name, tensor in whole.items():
        torch.testing.assert_close(rest[name], tensor, rtol=1e-4, atol=1e-6)
    assert any((half[name] - tensor).abs().max() > 1e-4 for name, tensor in whole.items())


def test_an_adapter_of_another_form_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    dlora.simulate(make_config(**BOTTLENECK, **{"train.rounds": 1, "peers.count": 2}))
    folder = str(tmp_path / "run" / "consensus")
    elsewhere = str(tmp_path / "other")
    for keys, said in (
        ({"r": 8}, "has r 4, and here it is 8"),
        ({"activation": "relu"}, "has activation gelu, and here it is relu"),
        ({"target_modules": "feed-forward"}, "has modules"),
    ):
        other = {"lora": {}, "bottleneck": {"r": 4, "adapter": folder} | keys}
        with pytest.raises(ModelError, match=rf"bottleneck.adapter: .*{said}"):
            prepare(make_config(**other, output_dir=elsewhere))
    with pytest.raises(ModelError, match=r"lora.adapter: .* no folder with a LoRA adapter"):
        prepare(make_config(**{"lora.adapter": folder}, output_dir=elsewhere))


def test_targets(make_config: MakeConfig) -> None:
    def found(family: str, wanted: Any) -> list[str]:
        keys = {"lora": {}, "bottleneck": {"r": 2, "target_modules": wanted}}
        targets: list[str] = prepare(make_config(family, **keys)).manifest["bottleneck"]["targets"]
        return targets

    assert found("bert", "feed-forward") == outputs("bert")[1::2]
    assert found("opt", "feed-forward") == outputs("opt")[1::2]
    assert found("bert", ["attention.output.dense"]) == outputs("bert")[::2]
    with pytest.raises(ModelError, match=r"^bottleneck.target_modules: nothing matches no module"):
        found("bert", ["nothing"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora": {"r": 4}}, "lora and bottleneck are two kinds of adapter; keep one"),
        ({"peers.rule": "ffa"}, "peers.rule ffa chooses between LoRA's A and B"),
        ({"bottleneck": {"activation": "tanh"}}, "'gelu', 'relu' or 'silu'"),
    ],
)
def test_what_is_refused(make_config: MakeConfig, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_config(**BOTTLENECK | keys)
