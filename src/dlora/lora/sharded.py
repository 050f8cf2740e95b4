"""A stacked model whose frozen weights are divided over several processes, which make every pass
together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from dlora.lora.factors import stack
from dlora.lora.stacked import StackedModel
from dlora.model.shards import shard


@dataclass
class ShardedModel(StackedModel):
    """A stacked model of which this process holds a part.

    A pass gathers weights from all processes, so each makes as many passes as the others. A process
    that has no rows left makes idle passes. ``any_has(yes)``: whether a process has a pass to make;
    all processes call it together, before each pass.
    """

    any_has: Callable[[bool], bool] = lambda yes: yes

    @classmethod
    def of(
        cls, model: StackedModel, mesh: DeviceMesh, any_has: Callable[[bool], bool]
    ) -> ShardedModel:
        """Divide the frozen weights of ``model``, which is whole on the CPU, over ``mesh``."""
        shard(model.network, mesh)
        return cls(**vars(model), any_has=any_has)

    def pass_begins(self) -> None:
        """Tell the other processes that they must make a pass too."""
        self.any_has(True)

    def passes_done(self, backward: bool) -> None:
        """Make idle passes until no process has rows left. Then idle factors are bound.

        ``backward``: the passes have a backward pass too.
        """
        tokens = torch.ones(1, 2, dtype=torch.int64, device=self.device)
        while self.any_has(False):
            factors = stack(self.initial, 1, self.device)
            self.use({name: tensor.requires_grad_(backward) for name, tensor in factors.items()})
            with torch.set_grad_enabled(backward):
                logits = self.network(input_ids=tokens, attention_mask=tokens).logits
                if backward:
                    logits.float().sum().backward()
