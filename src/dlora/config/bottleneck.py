"""The config block bottleneck: a small network after a block's sublayers, instead of LoRA."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias, get_args

from pydantic import Field

from dlora.config.reading import Section, Text
from dlora.config.training import LoraSection

Activation: TypeAlias = Literal["gelu", "relu", "silu"]
ACTIVATIONS = get_args(Activation)


class BottleneckSection(Section):
    """Bottleneck adapters instead of LoRA: y = h + up(activation(down(h))), where h is the output
    of a frozen linear (Houlsby et al., arXiv 1902.00751, section 2.1).
    """

    # as for lora.placement literal: a device has all that trains
    placement: ClassVar[Literal["literal"]] = "literal"

    r: int = Field(8, ge=1, description="width of the bottleneck")
    target_modules: Literal["output-projections", "feed-forward"] | tuple[Text, ...] | Text = Field(
        "output-projections",
        description=(
            "output-projections: the linears that end attention and feed-forward of each block;"
            " feed-forward: only the second; else names or one regex, as for lora"
        ),
    )
    activation: Activation = Field("gelu", description="the nonlinearity between down and up")
    adapter: Text | None = Field(
        None,
        min_length=1,
        description=(
            "a folder with a bottleneck adapter of dlora, from which all begin, such as"
            " RUN/consensus; null: they begin with the frozen model"
        ),
    )
    train_head: bool = Field(
        True, description="classification: train, mix and send the new head too"
    )


def check_bottleneck(lora: LoraSection, rule: str) -> None:
    """Raise ValueError if a config with a bottleneck says something that belongs to LoRA."""
    if lora != LoraSection():
        raise ValueError("lora and bottleneck are two kinds of adapter; keep one block")
    if rule != "factor":
        raise ValueError(
            f"peers.rule {rule} chooses between LoRA's A and B, which a bottleneck does not have;"
            " take rule factor"
        )
