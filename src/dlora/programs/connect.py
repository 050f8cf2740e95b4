"""A remote model for Python: an ordinary transformers class whose body runs in the cloud."""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from pathlib import Path
from typing import Any

from dlora.config.run import Config
from dlora.config.tasks import TASKS
from dlora.errors import ConfigError
from dlora.identity.federation import Federation, FederationFile
from dlora.identity.keys import Identity
from dlora.model.load import load_tokenizer
from dlora.run.core_directions import handed_directions
from dlora.run.frozen_model import check_halves, far_cloud
from dlora.split.device.half import as_ordinary, load_half


def connect(
    config: Config | str | Path, *, name: str, key: str | Path, federation: str | Path
) -> Any:
    """A ``...ForSequenceClassification`` or ``...ForCausalLM`` whose ``base_model`` runs in the
    cloud of ``config.split``.

    Token embedding, head, loss and labels are here. The parameters are the LoRA factors and, if it
    trains, the head. ``loss.backward()``, any torch optimiser, a transformers Trainer and
    ``save_pretrained`` (a PEFT folder) work on it. If labels are given, a language model's logits
    are NaN where the loss does not read them, because the cloud sends nothing for them. The link is
    made at the first forward, and again when it was lost; a wait for the cloud is logged.
    ``model.disconnect()`` or the end of ``with dlora.connect(...) as model`` ends the link.
    ``config`` may be the path of a YAML file. Raises UserError.
    """
    config, listed = Config.given(config), Federation.load(federation)
    identity = Identity.load(name, key, listed)
    check_halves(config, name, listed)
    if TASKS[config.task].names_labels and config.data.labels is None:
        raise ConfigError(
            "data.labels is missing; the head has an output for each, so name them all, in order"
        )
    if config.schedule.kind != "all":
        warnings.warn(
            "connect trains all units at all times: a schedule is for dlora device and dlora"
            " simulate",
            stacklevel=2,
        )
    half = load_half(
        config, load_tokenizer(config.model), config.data.labels, handed_directions(config)
    )
    network = as_ordinary(half)
    stack = contextlib.ExitStack()
    stack.enter_context(
        far_cloud(half, config, identity, FederationFile(federation), _log, lambda: False)
    )
    network.disconnect = weakref.finalize(network, stack.close)
    return network


def _log(event: str, reason: str) -> None:
    """Log a warning to the logger ``dlora``, which writes to stderr by default."""
    logging.getLogger("dlora").warning("%s: %s", event.replace("-", " "), reason)
