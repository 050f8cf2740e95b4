"""Law 12: scripts that mix with `dlora.Peer` end with the factors of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.run.prepare import prepare
from kit.script_peers import LOCK, Sites
from kit.updates import UPDATE_BOUND, assert_same, peft_oracle, update_of

pytestmark = pytest.mark.usefixtures("no_page")
NAMES = ("peer-0", "peer-1", "peer-2", "peer-3")


@pytest.mark.parametrize("topology", [{"kind": "ring"}, {"kind": "base-k", "k": 1}])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scripts_end_with_the_factors_of_the_simulation(
    make_config: Callable[..., Config], tmp_path: Path, optimizer: str, topology: dict[str, Any]
) -> None:
    """Each script is PEFT, torch's optimiser and a loop of its own; it gets the same batches."""
    config = make_config(
        **{
            "train.rounds": 3,
            "train.local_steps": 2,
            "train.optimizer": optimizer,
            "train.learning_rate": {"sgd": 0.5, "adamw": 5e-3}[optimizer],
            "train.lr_scheduler_type": "constant",
            "train.model_dropout": 0.0,
            "lora.target_modules": ["query", "value", "intermediate.dense"],
            "peers.count": 4,
            "peers.topology": topology,
        }
    )
    prepared = prepare(config)
    assert prepared.names == NAMES
    dlora.simulate(config)
    sites = Sites(tmp_path / "sites", NAMES, rounds=3, topology=topology)

    def script(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with LOCK:
            model, initial = peft_oracle(config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        own = kind(trained, lr=config.train.learning_rate, weight_decay=config.train.weight_decay)
        rows, peer = config.train.per_device_train_batch_size, sites.peer(name)
        with peer.joined(model):
            for step in range(6):
                taken = prepared.streams[NAMES.index(name)].take(step * rows, rows)
                batch = collate(
                    [prepared.data.peers[name][row] for row in taken], prepared.pad_token_id
                )
                model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    labels=batch.labels,
                ).loss.backward()
                if config.train.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
                own.step()
                own.zero_grad()
                if step % 2 == 1:
                    mixed = peer.mix()
                    assert mixed is not None and mixed.round == step // 2 and mixed.neighbours
            average = peer.average()
        with LOCK:
            final = peft.get_peft_model_state_dict(model)
            own_update = {key: final[key] - initial[key] for key in initial}
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if key in average:
                        parameter.copy_(average[key])
            consensus = peft.get_peft_model_state_dict(model)
            averaged = {key: consensus[key] - initial[key] for key in initial}
        return own_update, averaged

    for name, (own, average) in sites.run(script).items():
        for update, adapter in ((own, f"peers/{name}"), (average, "consensus")):
            reference = update_of(config, Path(config.output_dir) / adapter)
            assert_same(update, reference, UPDATE_BOUND[optimizer], config.task)
