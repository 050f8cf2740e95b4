"""Laws 1, 2 and 3: one participant is plain PEFT, P stacked are P separate runs, complete + one SGD
step is pooled SGD.

Differences are measured on the update D = factors minus initial factors, A and B apart: |D - D'| /
|D|.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.events.log import read_log
from dlora.run.prepare import Prepared, prepare
from kit.plain_loop import plain_loop
from kit.updates import (
    KINDS,
    LOSS_BOUND,
    SERVED,
    UPDATE_BOUND,
    assert_same,
    peft_oracle,
    targets,
    update_of,
)

pytestmark = pytest.mark.usefixtures("no_page")


def train_with_peft(
    config: Config, prepared: Prepared, peers: range
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain loop over the joint batches of ``peers``: one optimiser step a round. Returns losses
    and the update.
    """
    model, initial = peft_oracle(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = plain_loop(config, prepared, peers, model, trained)
    final = peft.get_peft_model_state_dict(model)
    return losses, {name: final[name] - initial[name] for name in initial}


# every model with one optimiser, in turn, and the slow ones with the other
@pytest.mark.parametrize(
    ("family", "task", "optimizer"),
    [
        pytest.param(*model, optimizer, marks=[pytest.mark.slow] * ((index + turn) % 2))
        for index, model in enumerate(SERVED)
        for turn, optimizer in enumerate(("adamw", "sgd"))
    ],
)
def test_one_participant_is_plain_peft(
    make_config: Callable[..., Config], family: str, task: str, optimizer: str
) -> None:
    config = make_config(
        family, task, **{
            "peers.count": 1, "train.rounds": 50, "train.local_steps": 1,
            "train.optimizer": optimizer, "eval_every": 0,
            "train.learning_rate": 5e-3 if optimizer == "adamw" else 0.1,
            "train.weight_decay": 0.01,
            "train.lr_scheduler_type": "linear", "train.warmup_steps": 5,
            "lora.target_modules": targets(family),
        },
    )  # fmt: skip
    dlora.simulate(config)
    losses, reference = train_with_peft(config, prepare(config), range(1))
    ours = [
        event["loss"]
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "round"
    ]
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < LOSS_BOUND
    assert losses[-1] < losses[0] - 0.01  # it learned something, so the update is more than noise
    assert_same(
        update_of(config, Path(config.output_dir, "consensus")),
        reference,
        UPDATE_BOUND[optimizer],
        task,
    )


def loss_in_peft(config: Config) -> float:
    """The loss of a classifier's exported average, loaded by PEFT on the run's model."""
    base, _ = dlora.load_base(config.output_dir)
    model = peft.PeftModel.from_pretrained(base, Path(config.output_dir, "consensus")).eval()
    prepared = prepare(config)
    batch = collate(prepared.data.evaluation, prepared.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return torch.nn.functional.cross_entropy(logits, batch.labels).item()


ONE_AT_A_TIME = pytest.mark.filterwarnings("ignore:peers train one at a time")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "patterns"),
        ("bert", "dora-dropout"),
        ("bert", "biases"),
        pytest.param("bert", "whole-modules", marks=ONE_AT_A_TIME),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [
                *(("bert", kind) for kind in ("rslora", "dora", "gaussian", "layers")),
                *((family, "dora") for family in ("gpt2", "llama")),
                ("gpt2", "biases"),
                ("gpt2", "biases-lora-only"),
            ]
        ),
    ],
)
def test_pefts_words_mean_what_they_mean_there(
    make_config: Callable[..., Config], family: str, kind: str
) -> None:
    """Law 1, and the exported folder gives the printed score in PEFT."""
    config = make_config(
        family, **{
            "peers.count": 1, "train.rounds": 50, "train.local_steps": 1, "eval_every": 0,
            "train.learning_rate": 5e-3, "train.lr_scheduler_type": "constant",
            "lora.target_modules": targets(family), **KINDS[kind],
        },
    )  # fmt: skip
    summary = dlora.simulate(config)
    losses, reference = train_with_peft(config, prepare(config), range(1))
    assert losses[-1] < losses[0] - 0.01
    folder = Path(config.output_dir, "consensus")
    assert_same(update_of(config, folder), reference, UPDATE_BOUND["adamw"], "classification")
    printed = summary["runs"]["dec-lora"]["consensus"]["loss"]
    assert loss_in_peft(config) == pytest.approx(printed, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "init"),
    [
        ("bert", "pissa"),
        pytest.param("gpt2", "pissa", marks=pytest.mark.slow),
        pytest.param("bert", "olora", marks=pytest.mark.slow),
        pytest.param("roberta", "olora", marks=pytest.mark.slow),
    ],
)
def test_what_is_taken_out_of_the_weights_comes_back(
    make_config: Callable[..., Config], family: str, init: str
) -> None:
    """Law 1 by the losses, since the folder has another rank; it loads on the model as it was."""
    config = make_config(
        family, **{
            "peers.count": 1, "train.rounds": 25, "train.local_steps": 1, "eval_every": 0,
            "train.learning_rate": 1e-3 if init == "pissa" else 3e-4,
            "train.lr_scheduler_type": "constant",
            "lora.target_modules": targets(family), "lora.init_lora_weights": init,
            "lora.use_rslora": init == "olora",
        },
    )  # fmt: skip
    summary = dlora.simulate(config)
    losses, _ = train_with_peft(config, prepare(config), range(1))
    assert losses[-1] < losses[0] - 0.01
    ours = [
        event["loss"]
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "round"
    ]
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < LOSS_BOUND
    printed = summary["runs"]["dec-lora"]["consensus"]["loss"]
    assert loss_in_peft(config) == pytest.approx(printed, abs=1e-5)
    assert dlora.score(config.output_dir)["consensus"]["loss"] == pytest.approx(printed, abs=1e-5)


@pytest.mark.slow
@ONE_AT_A_TIME
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "-" not in kind and kind != "ia3"])
def test_stacks_of_these_are_separate_runs(
    make_config: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    """Law 2: four peers at once, and one at a time."""
    ends = []
    for size in (1, 4):
        keys = {"lora.target_modules": targets("bert"), "train.learning_rate": 5e-3, **KINDS[kind]}
        config = make_config(
            "bert", **keys, **{"peers.group_size": size}, output_dir=str(tmp_path / str(size))
        )
        dlora.simulate(config)
        ends.append(update_of(config, Path(config.output_dir, "peers", "peer-2")))
    assert_same(ends[1], ends[0], UPDATE_BOUND["adamw"], "classification")


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_one_participant_is_plain_peft_with_dropout(
    make_config: Callable[..., Config], family: str
) -> None:
    config = make_config(
        family, **{
            "peers.count": 1, "train.rounds": 50, "train.local_steps": 1, "eval_every": 0,
            "lora.lora_dropout": 0.1,
            "train.model_dropout": None, "lora.target_modules": targets(family),
        },
    )  # fmt: skip
    dlora.simulate(config)
    losses, reference = train_with_peft(config, prepare(config), range(1))
    ours = [
        event["loss"]
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "round"
    ]
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < LOSS_BOUND
    update = update_of(config, Path(config.output_dir, "consensus"))
    assert_same(update, reference, UPDATE_BOUND["adamw"], config.task)


@pytest.mark.parametrize(
    ("family", "task", "optimizer"),
    [
        ("bert", "classification", "adamw"),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [
                ("bert", "regression", "sgd"),
                ("bert", "multi-label", "adamw"),
                ("bert", "token-classification", "adamw"),
                ("llama", "causal-lm", "sgd"),
                ("bert", "classification", "sgd"),
                ("llama", "causal-lm", "adamw"),
                ("gpt2", "classification", "adamw"),
                ("gpt2", "classification", "sgd"),
            ]
        ),
    ],
)
def test_stacked_participants_are_separate_runs(
    make_config: Callable[..., Config], family: str, task: str, optimizer: str
) -> None:
    """Four stacked participants against four PEFT runs, each over one peer's rows, each clipped by
    its own norm.
    """
    config = make_config(
        family, task, **{
            "train.rounds": 50, "train.local_steps": 1, "eval_every": 0,
            "train.optimizer": optimizer,
            "train.max_grad_norm": 0.1,
            "train.learning_rate": 5e-3 if optimizer == "adamw" else 0.1,
            "lora.target_modules": targets(family),
            "peers.topology": {"kind": "edges", "edges": [[0, 1], [1, 2], [2, 3]]},
            "compare": ["local"],
        },
    )  # fmt: skip
    dlora.simulate(config)
    prepared = prepare(config)
    stacked = load_file(
        Path(config.output_dir, "checkpoints/local/round-000050/factors.safetensors")
    )
    _, initial = peft_oracle(config)
    for peer in range(4):
        update = {}
        for name in initial:
            short = name.removeprefix("base_model.model.")
            short = short.removesuffix(".weight") if "lora_" in short else short
            update[name] = stacked[short][peer] - initial[name]
        _, reference = train_with_peft(config, prepared, range(peer, peer + 1))
        assert_same(update, reference, UPDATE_BOUND[optimizer], task)


def test_complete_graph_with_one_sgd_step_is_pooled_sgd(make_config: Callable[..., Config]) -> None:
    config = make_config(
        "bert", **{
            # 6 rounds: later this step size is past stable, and what is rounding here grows
            "train.rounds": 6, "train.local_steps": 1, "eval_every": 0, "train.optimizer": "sgd",
            "train.learning_rate": 0.2, "train.max_grad_norm": None,
            "peers.topology": {"kind": "complete"},
            "compare": ["pooled"], "lora.target_modules": targets("bert"),
        },
    )  # fmt: skip
    dlora.simulate(config)
    _, reference = train_with_peft(config, prepare(config), range(4))
    assert_same(
        update_of(config, Path(config.output_dir, "consensus")),
        reference,
        UPDATE_BOUND["sgd"],
        config.task,
    )
    pooled = load_file(
        Path(config.output_dir, "checkpoints/pooled/round-000006/factors.safetensors")
    )
    gossiped = load_file(
        Path(config.output_dir, "checkpoints/dec-lora/round-000006/factors.safetensors")
    )
    for name, tensor in pooled.items():
        torch.testing.assert_close(gossiped[name].mean(0), tensor[0], rtol=1e-4, atol=1e-6)
