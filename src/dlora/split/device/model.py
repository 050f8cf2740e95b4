"""The stacked model of a device: the cloud hears which units are killed and what the loss reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dlora.lora.stacked import StackedModel
from dlora.split.device.body import RemoteBody
from dlora.split.device.inputs import target_positions


@dataclass(kw_only=True)
class SplitModel(StackedModel):
    """A stacked model with one participant, whose ``body`` runs in the cloud."""

    body: RemoteBody

    def use(self, factors: Mapping[str, Tensor], killed: frozenset[int] = frozenset()) -> None:
        """Bind the factors; the cloud computes no gradients for the killed units."""
        super().use(factors, killed)
        self.body.killed = killed

    def inputs_for(self, labels: Tensor) -> dict[str, Tensor]:
        """``loss_positions`` (B, L) bool: where a language model's loss reads hidden states.

        The cloud sends no others.
        """
        if self.task.has_head or labels.dim() != 2:
            return {}
        return {"loss_positions": target_positions(labels)}
