"""Law 12: scripts that mix with `dlora.Peer`, or its callback, end as the simulation does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.data.formats import Example
from dlora.run.prepare import prepare
from kit.script_peers import LOCK, Sites
from kit.trainer_sites import make_trainer
from kit.updates import UPDATE_BOUND, assert_same, peft_oracle, update_of

pytestmark = pytest.mark.usefixtures("no_page")
Update = dict[str, Tensor]
NAMES = ("peer-0", "peer-1", "peer-2", "peer-3")


LEARNING_RATE = {"sgd": 0.5, "adamw": 5e-3}


@pytest.fixture(
    params=[
        ("sgd", "ring", False),
        ("adamw", "base-k", False),
        pytest.param(("adamw", "ring", True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def config(request: pytest.FixtureRequest, make_config: Callable[..., Config]) -> Config:
    """Three rounds of two local steps by four peers."""
    optimizer, topology, overlap = request.param
    return make_config(
        **{
            "train.rounds": 3,
            "train.local_steps": 2,
            "train.optimizer": optimizer,
            "train.learning_rate": LEARNING_RATE[optimizer],
            "train.lr_scheduler_type": "constant",
            "train.model_dropout": 0.0,
            "lora.target_modules": ["query", "value", "intermediate.dense"],
            "peers.count": 4,
            "peers.topology": {"kind": topology},
            "peers.overlap": overlap,
        }
    )


def sites_of(config: Config, folder: Path) -> Sites:
    peers = {"topology": {"kind": config.peers.topology.kind}, "overlap": config.peers.overlap}
    return Sites(folder, NAMES, rounds=config.train.rounds, **peers)


def rows_of(config: Config) -> dict[str, list[Example]]:
    """The rows that each peer of the simulation reads, in its order."""
    prepared, steps = prepare(config), config.train.rounds * 2
    assert prepared.names == NAMES
    taken = {
        name: prepared.streams[place].take(0, steps * config.train.per_device_train_batch_size)
        for place, name in enumerate(NAMES)
    }
    return {name: [prepared.data.peers[name][row] for row in rows] for name, rows in taken.items()}


def assert_as_simulated(config: Config, ended: dict[str, tuple[Update, Update]]) -> None:
    """Each peer's own update and the average are those of the simulation."""
    dlora.simulate(config)
    for name, (own, average) in ended.items():
        for update, adapter in ((own, f"peers/{name}"), (average, "consensus")):
            reference = update_of(config, Path(config.output_dir) / adapter)
            assert_same(update, reference, UPDATE_BOUND[config.train.optimizer], config.task)


def updates(
    model: Any, initial: Update, peer: dlora.Peer, average: Update
) -> tuple[Update, Update]:
    """The update of the model, and that of the average."""
    own = peft.get_peft_model_state_dict(model)
    own = {key: own[key] - initial[key] for key in initial}
    with peer.holding(average):
        mean = peft.get_peft_model_state_dict(model)
        return own, {key: mean[key] - initial[key] for key in initial}


def test_plain_loops_end_with_the_factors_of_the_simulation(config: Config, tmp_path: Path) -> None:
    """Each script is PEFT, torch's optimiser and a loop of its own; it gets the same batches."""
    sites, rows = sites_of(config, tmp_path / "sites"), rows_of(config)
    models = {name: peft_oracle(config) for name in NAMES}  # they draw from one generator

    def script(name: str) -> tuple[Update, Update]:
        model, initial = models[name]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        train = config.train
        kind: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[train.optimizer]
        optimizer = kind(trained, lr=train.learning_rate, weight_decay=train.weight_decay)
        with (peer := sites.peer(name)).joined(model):
            for step in range(1, 7):
                batch = collate(rows[name][4 * (step - 1) : 4 * step], 0)
                model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    labels=batch.labels,
                ).loss.backward()
                if train.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if step % 2 == 0:
                    mixed = peer.mix()
                    due = step // 2 - 1 - config.peers.overlap  # the exchange that has ended
                    assert (due < 0 and mixed is None) or (mixed and mixed.round == due)
                    assert mixed is None or mixed.neighbours
            average = peer.average()
            with LOCK:
                return updates(model, initial, peer, average)

    assert_as_simulated(config, sites.run(script))


def test_trainers_end_with_the_factors_of_the_simulation(config: Config, tmp_path: Path) -> None:
    """The same with transformers' Trainer and the callback."""
    sites, rows = sites_of(config, tmp_path / "sites"), rows_of(config)
    models = {name: peft_oracle(config) for name in NAMES}  # they draw from one generator
    train = config.train

    trainers = {
        name: make_trainer(
            model,
            rows[name],
            tmp_path / name,
            [dlora.PeerCallback(every_steps=2, **sites.arguments(name))],
            max_steps=6,
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm or 0.0,
            optim={"adamw": "adamw_torch", "sgd": "sgd"}[train.optimizer],
        )
        for name, (model, _) in models.items()
    }

    def script(name: str) -> tuple[Update, Update]:
        trainers[name].train()
        own, initial = peft.get_peft_model_state_dict(trainers[name].model), models[name][1]
        consensus = load_file(tmp_path / name / "consensus" / "adapter_model.safetensors")
        return (
            {key: own[key] - initial[key] for key in initial},
            {key: consensus[key] - initial[key] for key in initial},
        )

    assert_as_simulated(config, sites.run(script))
