"""Whether a model can be trained: one forward on the run's own rows, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dlora.data.batches import collate
from dlora.data.formats import Example
from dlora.errors import ModelError
from dlora.lora.factors import stack
from dlora.lora.layers import Adapted
from dlora.lora.stacked import StackedModel
from dlora.train import forward


@torch.no_grad()
def try_model(model: StackedModel, rows: Sequence[Example], pad_token_id: int, name: str) -> None:
    """Raise ModelError if the forward fails, or if updates of an adapted weight would have no
    effect.
    """
    layers = {
        path: layer for path, layer in model.network.named_modules() if isinstance(layer, Adapted)
    }
    called: set[str] = set()
    versions = {path: parameter._version for path, parameter in model.network.named_parameters()}
    hooks = [
        layer.register_forward_hook(lambda *_, path=path: called.add(path))
        for path, layer in layers.items()
    ]
    kind = type(model.network).__name__
    model.use(stack(model.initial, 1, model.device))
    model.network.eval()
    try:
        with torch.random.fork_rng():
            forward(model, collate(rows, pad_token_id).to(model.device))
    except torch.OutOfMemoryError:
        raise
    except (
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        ArithmeticError,
    ) as error:
        line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ModelError(
            f"model {name}: the forward of {kind} fails on the first rows ({type(error).__name__}:"
            f" {line}); take a model of another architecture, or another task or pooling"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if versions != {
        path: parameter._version for path, parameter in model.network.named_parameters()
    }:
        raise ModelError(
            f"model {name}: {kind} changes its weights while it runs, and would not change the"
            " updates too; take a model of another architecture"
        )
    passed_by = sorted(
        {
            path.rpartition(".")[2]
            for path, layer in layers.items()
            if layer.bare and path not in called
        }
    )
    rest = sorted({path.rpartition(".")[2] for path in layers} - set(passed_by))
    if passed_by:
        raise ModelError(
            f"model {name}: {kind} reads the weight of {', '.join(passed_by)} itself, so that an"
            " update would have no effect; leave that out: lora.target_modules:"
            f" [{', '.join(rest)}]"
        )
