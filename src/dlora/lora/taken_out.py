"""PiSSA and OLoRA: A and B that are taken out of frozen weights, and the file that keeps them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# It comes before peft: it silences the messages that peft's imports print.
from dlora.model.quiet import without_bitsandbytes

# isort: split
import safetensors
import torch
from safetensors.torch import load_file, save

with without_bitsandbytes():
    from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlora.config.training import TAKEN_OUT, LoraSection
from dlora.errors import ModelError, RunError
from dlora.files import write_atomically

TAKEN_OUT_FILE = "taken-out.safetensors"  # in the folder of a run


def refuse_taken_out(network: nn.Module, section: LoraSection, targets: Collection[str]) -> None:
    """Raise ModelError where PiSSA or OLoRA cannot take A and B out of a weight."""
    if section.init_lora_weights not in TAKEN_OUT:
        return
    for name in targets:
        linear: Any = network.get_submodule(name)
        if isinstance(linear, Conv1D) and section.init_lora_weights == "olora":
            raise ModelError(
                f"lora.init_lora_weights olora: {name} stores its weight transposed, which PEFT's"
                " OLoRA does not know; take pissa"
            )
        ranks = section.rank_pattern or {}
        r, most = ranks.get(get_pattern_key([*ranks], name), section.r), min(linear.weight.shape)
        if r > most:
            raise ModelError(
                f"lora.init_lora_weights {section.init_lora_weights}: rank {r}, but {name} has only"
                f" {most} rows or columns; lower lora.r"
            )


@torch.no_grad()
def take_out(
    name: str, layer: Any, init_lora_weights: Any, kept: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Take A (r, I) and B (O, r) out of the weight of a LoRA layer of PEFT: W - s B A is left.
    Returns both, float32 on the CPU.

    ``kept``: those of an earlier process by name; None: PEFT finds them, and their last bits depend
    on the processor and the number of threads. The difference is computed in float64 on the CPU and
    then rounded, so that it follows from A and B. Raises RunError if ``kept`` has no such A and B.
    """
    linear = layer.get_base_layer()
    weight, dtype = linear.weight.data.clone(), linear.weight.dtype
    shapes = [tuple(half["default"].weight.shape) for half in (layer.lora_A, layer.lora_B)]
    if kept is not None:
        found = [kept.get(f"{name}.{half}", torch.empty(0)) for half in ("lora_A", "lora_B")]
        if [tuple(tensor.shape) for tensor in found] != shapes:
            raise RunError(
                f"{TAKEN_OUT_FILE} has no A and B of {shapes} for {name}; restore the file, or"
                " start anew in another output_dir"
            )
    else:
        if init_lora_weights == "pissa":
            layer.pissa_init("default", init_lora_weights)
        else:
            layer.olora_init("default")
        halves = (layer.lora_A, layer.lora_B)
        found = [half["default"].weight.float().cpu().clone() for half in halves]
    lora_A, lora_B = found
    out_OI = layer.scaling["default"] * (lora_B.double() @ lora_A.double())
    if layer.fan_in_fan_out:  # GPT-2's Conv1D stores the weight as (I, O)
        out_OI = out_OI.T
    linear.weight.data = (weight.cpu().double() - out_OI).to(dtype).to(weight.device)
    return lora_A, lora_B


def keep_taken_out(run: Path, taken_out: Mapping[str, Tensor]) -> None:
    """Write A and B into a run's folder, if they are not there yet: the run is resumed and scored
    with them. Raises RunError when the file cannot be written.
    """
    path = run / TAKEN_OUT_FILE
    if taken_out and not path.exists():
        write_atomically(path, save({name: one.contiguous() for name, one in taken_out.items()}))


def kept_taken_out(run: Path) -> dict[str, Tensor] | None:
    """The A and B that a run's folder keeps; None if it has none. Raises RunError when the file is
    damaged.
    """
    path = run / TAKEN_OUT_FILE
    if not path.exists():
        return None
    try:
        kept: dict[str, Tensor] = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); restore it, or start anew in another output_dir"
        ) from error
    return kept
