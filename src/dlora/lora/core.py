"""Core directions: the top singular directions of a weight; a small trained core joins them.

Shape letters: P participants, R rank, I in, O out. For W (O, I) = U S V^T the core directions are

    lora_A = V^T, the top R rows (R, I)        lora_B = U, the top R columns (O, R)

Both are frozen, and all participants have the same ones. Only the core ``lora_M`` (R, R) is
trained, and delta_weight = scaling x B M A. LoRA-XS (arXiv 2405.17604) takes A = S V^T; without S
the accuracy was one point better at equal steps, and training stayed stable at higher learning
rates (docs/lab-log.md). M starts at zero, so training starts from the frozen model. The gradient of
M is B^T G A^T there, which is not zero. (LoRA-XS draws M with a standard deviation of 1e-5.)

``Directions`` maps ``<module>.lora_A`` and ``<module>.lora_B`` to float32 tensors on the CPU. Two
machines compute slightly different singular vectors, and very different ones where singular values
are close. For this reason the directions are kept in a file, which all participants use. The config
names that file ``lora.frame``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dlora.errors import ConfigError, ModelError, RunError
from dlora.files import write_atomically
from dlora.lora.factors import Factors

Directions = dict[str, Tensor]
DIRECTIONS_FILE = "frame.safetensors"  # within a run folder
_OF_THE_WEIGHT = (
    # Largest allowed |A - directions of B^T W| / |A|: above the rounding of any machine, far below
    # the value for another checkpoint.
    1e-3
)


def compute_directions(layers: Mapping[str, nn.Module], r: int) -> Directions:
    """The core directions of rank ``r`` of every linear in ``layers``, which maps names to linears.

    Raises ConfigError when a weight has fewer than ``r`` directions.
    """
    directions: Directions = {}
    for name, layer in layers.items():
        lora_A, lora_B = top_directions(_weight(name, layer, r), r)
        directions |= {
            f"{name}.lora_A": lora_A.float().cpu(),
            f"{name}.lora_B": lora_B.float().cpu(),
        }
    return directions


@torch.no_grad()
def top_directions(weight_OI: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of a weight (O, I), in float64.

    The sign is fixed so that the entry of B with the largest absolute value is positive in each
    direction. The directions come from the eigenvectors of the smaller of W W^T and W^T W, which
    takes a fraction of the time of a full SVD. The condition number is squared by this, but in
    float64 the error in the top directions is still below float32's precision.
    """
    # the device mps has no float64
    weight_OI = (weight_OI.cpu() if weight_OI.device.type == "mps" else weight_OI).double()
    wide = weight_OI.shape[0] <= weight_OI.shape[1]
    # the eigenvalues, and so their vectors, come in ascending order
    _, vectors = torch.linalg.eigh(weight_OI @ weight_OI.T if wide else weight_OI.T @ weight_OI)
    top = vectors[:, -r:].flip(1)
    lora_B = top if wide else _directions(weight_OI @ top, 0)
    lora_B = lora_B * lora_B.gather(0, lora_B.abs().argmax(dim=0, keepdim=True)).sign()
    return _directions(lora_B.T @ weight_OI, 1).contiguous(), lora_B.contiguous()  # V^T, U


def directions_of(
    directions: Mapping[str, Tensor],
    layers: Mapping[str, nn.Module],
    r: int,
    weights_here: bool = True,
) -> Directions:
    """The core directions of these linears, taken from the directions of a file.

    The file may name modules as they are named within the body or within the whole model; both are
    found. ``weights_here``: the linears have their weights, so the directions are compared with
    them. Raises ModelError when a linear is not in the file, the rank is not ``r``, or the
    directions belong to another weight; raises ConfigError when a weight has fewer than ``r``
    directions.
    """
    find, found = _by_name(directions), Directions()
    for name, layer in layers.items():
        for half in ("lora_A", "lora_B"):
            tensor = find(f"{name}.{half}")
            if tensor is None:
                raise ModelError(
                    f"lora.frame: {name} is adapted here but not in the frame; it was made for"
                    " other lora.target_modules or another model"
                )
            found[f"{name}.{half}"] = tensor
        weight_OI = _weight(name, layer, r)
        lora_A, lora_B = (
            found[f"{name}.{half}"].to(weight_OI.device) for half in ("lora_A", "lora_B")
        )
        shapes, expected = (
            (tuple(lora_A.shape), tuple(lora_B.shape)),
            ((r, weight_OI.shape[1]), (weight_OI.shape[0], r)),
        )
        if shapes != expected:
            raise ModelError(
                f"lora.frame: {name} has A and B of {shapes}, expected {expected}; it was made for"
                " another lora.r"
            )
        if weights_here and not _is_of(weight_OI, lora_A, lora_B):
            raise ModelError(
                f"lora.frame: {name} is not of this model's weight; it was made for another"
                " checkpoint"
            )
    return found


def is_in(directions: Directions, other: Directions) -> bool:
    """Whether ``other`` has equal directions for each module of ``directions``.

    ``other`` may name modules as they are named within the body or within the whole model.
    """
    find = _by_name(other)
    return all(
        (same := find(name)) is not None and torch.equal(tensor, same)
        for name, tensor in directions.items()
    )


def _by_name(directions: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
    known = {name.partition(".")[2]: tensor for name, tensor in directions.items()} | dict(
        directions
    )
    return lambda name: known.get(name, known.get(name.partition(".")[2]))


def _is_of(weight_OI: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether A and B are directions of this weight; NaN in A, B or the weight gives False."""
    return bool(
        (lora_A - _directions(lora_B.T @ weight_OI, 1)).norm() <= _OF_THE_WEIGHT * lora_A.norm()
    )


def _directions(vectors: Tensor, dim: int) -> Tensor:
    """The vectors scaled to length 1 along ``dim``; a zero vector stays zero."""
    lengths: Tensor = vectors.norm(dim=dim, keepdim=True)
    return vectors / lengths.clamp(min=torch.finfo(torch.float32).tiny)


def pairs(factors: Mapping[str, Tensor], directions: Mapping[str, Tensor]) -> Factors:
    """The factors, (P, ...) each, with every core M replaced by the ordinary pair A and B M.

    The pair has the same scaling as the core. All other tensors stay as they are.
    """
    ordinary: Factors = {}
    for name, tensor in factors.items():
        if not name.endswith(".lora_M"):
            ordinary[name] = tensor
            continue
        module = name.removesuffix(".lora_M")
        lora_A, lora_B = (
            directions[f"{module}.{half}"].to(tensor) for half in ("lora_A", "lora_B")
        )
        ordinary[f"{module}.lora_A"] = lora_A.expand(len(tensor), *lora_A.shape)
        ordinary[f"{module}.lora_B"] = lora_B @ tensor
    return ordinary


def write_directions(path: Path, directions: Directions) -> None:
    """Write the directions to a file. Raises RunError when it cannot be written."""
    write_atomically(path, save(directions))


def read_directions(path: Path) -> Directions:
    """Read the directions in a file. Raises RunError when `write_directions` did not write it."""
    try:
        directions: Directions = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(
            f"frame {path} cannot be read ({error}); copy it anew from where it was made"
        ) from error
    if any(tensor.dtype != torch.float32 or tensor.dim() != 2 for tensor in directions.values()):
        raise RunError(f"{path} is no frame; copy it anew from where it was made")
    return directions


@torch.no_grad()
def _weight(name: str, layer: nn.Module, r: int) -> Tensor:
    """The dense weight of a linear as (O, I) float32; a quantised weight is dequantised.

    Raises ConfigError when the weight has fewer than ``r`` singular directions.
    """
    # Imported here, because dlora.model must be imported before peft: it silences peft's imports.
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer).detach().float()
    # GPT-2's Conv1D stores the weight as (I, O)
    weight_OI = weight if isinstance(layer, nn.Linear) else weight.T
    if min(weight_OI.shape) < r:
        raise ConfigError(
            f"lora.r {r}: {name} is {tuple(weight_OI.shape)} and has {min(weight_OI.shape)}"
            " singular directions; lower lora.r (a cloud's: core.r), leave it out of"
            " lora.target_modules, or take placement: literal"
        )
    return weight_OI
