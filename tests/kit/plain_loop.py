"""A plain training loop, with torch and transformers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.run.prepare import Prepared
from dlora.seeds import derive_seed


def plain_loop(
    config: Config,
    prepared: Prepared,
    peers: Iterable[int],
    model: Any,
    trained: Sequence[Tensor],
    skip_first: bool = False,
) -> list[float]:
    """One optimiser step a round over the joint batches of ``peers``; the loss of each.

    ``skip_first``: a row's first token is no target, also where virtual tokens stand before it.
    """
    train, numbers = config.train, list(peers)
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[train.optimizer](
        trained, lr=train.learning_rate, weight_decay=train.weight_decay
    )
    schedule = transformers.get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=train.warmup_steps,
        num_training_steps=train.rounds,
    )
    rows, losses = train.per_device_train_batch_size, []
    model.train()
    for step in range(train.rounds):
        examples = [
            prepared.data.peers[prepared.names[peer]][row]
            for peer in numbers
            for row in prepared.streams[peer].take(step * rows, rows)
        ]
        batch = collate(examples, prepared.pad_token_id)
        if skip_first:
            batch.labels[:, 0] = -100
        torch.manual_seed(derive_seed(config.seed, "dropout", step, "peer-0"))
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        loss.backward()
        if train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
