"""The config of a cloud, which its owner writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dlora.config.reading import Document, Section, Text
from dlora.config.run import DeviceMap, Quantization, check_place


class LimitsSection(Section):
    """Limits of the cloud, so that no device can use it up for the others."""

    max_devices: int = Field(64, ge=1, description="linked at once; the next one waits for a place")
    max_tokens: int = Field(16384, ge=1, description="of one device, in the cloud at once")
    max_parts: int = Field(
        64, ge=1, description="micro-batches of one device, in the cloud at once"
    )
    memory_bytes: int | None = Field(
        None,
        ge=1,
        description=(
            "memory for the parts of all devices; null: 60 % of the memory that is free after the"
            " model is loaded"
        ),
    )
    idle_s: float = Field(
        120, gt=0, description="work of a device that is silent for so long is dropped"
    )


class CoreSection(Section):
    """The core directions that the cloud holds for devices with placement core."""

    r: int = Field(ge=1, description="rank of the directions; equal to the devices' lora.r")
    frame: Text = Field(
        min_length=1,
        description=(
            "the file of the directions; it is written if it does not exist; devices need a copy"
            " (lora.frame)"
        ),
    )


class CloudConfig(Document):
    """One cloud. `CloudConfig.load` reads it from YAML. Only `model` must be given."""

    model: Text = Field(
        description="a hub name, a folder, or pkg://package/folder inside an installed package"
    )
    quantization: Quantization = Field(
        "none", description="of the frozen weights; needs dlora[4bit]"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen weights")
    device: Text = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    device_map: DeviceMap | None = Field(
        None,
        description=(
            "null, or a word or {module: device} as in transformers: the model over several devices"
        ),
    )
    core: CoreSection | None = Field(
        None, description="for devices with lora.placement core; null: none are served"
    )
    limits: LimitsSection = LimitsSection()
    listen: Text | None = Field(
        None, description="HOST:PORT; null: all interfaces at the port of this member's address"
    )
    metrics: Text | None = Field(
        None, description="HOST:PORT for Prometheus, for example 127.0.0.1:9100; null: no metrics"
    )

    @model_validator(mode="after")
    def _one_place(self) -> CloudConfig:
        check_place(self.device, self.device_map)
        return self
