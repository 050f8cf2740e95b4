"""Which linears are adapted: the ones that the config names and that PEFT can load again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Sequence

# These come before peft: they silence the messages that peft's imports print.
from dlora.model.layers import LINEAR, block_linears, block_lists, is_linear
from dlora.model.quiet import without_bitsandbytes

# isort: split
with without_bitsandbytes():
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from dlora.config.training import LoraSection
from dlora.errors import ModelError

_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # as PEFT finds the number of a layer
# The user is warned when all-linear reaches less than this part of the blocks' weights.
_WORTH_SAYING = 0.9
# In these architectures a kernel reads the weights of out_proj and dt_proj directly, so an adapter
# on them has no effect. peft.tuners.tuners_utils._check_lora_target_modules_mamba refuses
# out_proj for this reason; dt_proj is used in the same way.
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


def find_targets(network: nn.Module, section: LoraSection, head: Sequence[str]) -> list[str]:
    """The full names of the linears that ``lora.target_modules`` names, in the network's order.

    Linears of the ``head`` are never among them. As in PEFT, a string is a regex and a list holds
    full names or ends of names. ``exclude_modules`` and ``layers_to_transform`` leave out as PEFT
    does. Warns when all-linear leaves out many weights of the blocks. Raises
    ModelError when a target matches nothing, matches a module that is no linear, shares its weight
    with another module, or has a name that PEFT reads as the weights of experts.
    """
    found = _named(network, section, head)
    left_out = section.exclude_modules
    for one in [left_out] if isinstance(left_out, str) else left_out or ():
        pattern = _pattern(one, isinstance(left_out, str), "exclude_modules")
        if not any(pattern.fullmatch(name) for name, _ in network.named_modules()):
            raise ModelError(
                f"lora.exclude_modules: {one} matches no module; the linears here are"
                f" {linear_names(network)}"
            )
    kept = _kept(found, section)
    if not kept:
        given = " and ".join(
            f"lora.{key}"
            for key in ("exclude_modules", "layers_to_transform")
            if getattr(section, key) is not None
        )
        raise ModelError(
            f"{given}: nothing is left of what lora.target_modules names, such as {found[0]}"
        )
    for key, named in (
        ("rank_pattern", section.rank_pattern),
        ("alpha_pattern", section.alpha_pattern),
    ):
        for one in named or ():
            _pattern(one, True, key)  # raises an error if it is no regex
            if not any(get_pattern_key([one], name) == one for name in kept):
                raise ModelError(f"lora.{key}: {one} matches no adapted linear, such as {kept[0]}")
    return kept


def find_saved(
    network: nn.Module, section: LoraSection, head: Sequence[str], targets: Sequence[str]
) -> list[str]:
    """The full names of the modules that ``lora.modules_to_save`` names, without the ``head``,
    which trains anyway.

    As for targets, a name is a full name or an end of one. PEFT gets the full names: a short one
    would also mean every module whose name ends with it. Raises ModelError when a name matches
    nothing, when a module holds an adapted linear or another module that is named, or when to PEFT
    its full name means several.
    """
    known = [name for name, _ in network.named_modules() if name]
    weighted = {name.rpartition(".")[0] for name, _ in network.named_parameters()}
    found: list[str] = []
    for one in section.modules_to_save or ():
        pattern = _pattern(one, False, "modules_to_save")
        matched = [name for name in known if pattern.fullmatch(name)]
        if not matched:
            raise ModelError(
                f"lora.modules_to_save: {one} matches no module; those with weights are"
                f" {_last_parts(weighted)}"
            )
        found += [name for name in matched if name not in found and not _within(name, head)]
    for name in found:
        inside = [other for other in (*targets, *found) if other.startswith(f"{name}.")]
        if inside:
            raise ModelError(
                f"lora.modules_to_save: {name} holds {inside[0]}, which trains by itself; name one"
                " of them, or leave the linear out with exclude_modules"
            )
        if any(other != name and other.endswith(name) for other in known):
            raise ModelError(
                f"lora.modules_to_save: PEFT takes every module whose name ends with {name}, and"
                " there are several; name another module"
            )
    return found


def _kept(found: Sequence[str], section: LoraSection) -> list[str]:
    """The names that PEFT keeps by ``exclude_modules`` and ``layers_to_transform``."""
    layers, left_out = section.layers_to_transform, section.exclude_modules
    if layers is None and left_out is None:
        return list(found)
    trial = peft.LoraConfig(
        target_modules=sorted({name.rpartition(".")[2] for name in found}),
        exclude_modules=left_out if isinstance(left_out, str) else list(left_out or ()),
        layers_to_transform=layers if isinstance(layers, int) or layers is None else list(layers),
    )
    kept = [name for name in found if check_target_module_exists(trial, name) is True]
    numbers = [int(match[1]) for name in found if (match := _LAYER.match(name))]
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if layer not in numbers:
            raise ModelError(
                f"lora.layers_to_transform: layer {layer} has no adapted linear; the first number"
                f" in a name such as {found[0]} is its layer"
            )
    return kept


def _named(network: nn.Module, section: LoraSection, head: Sequence[str]) -> list[str]:
    """The linears that ``target_modules`` names."""
    names = [name for name, _ in network.named_modules() if name and not _within(name, head)]
    targets = section.target_modules
    if targets == "all-linear":
        found = [name for name in block_linears(network) if not _within(name, head)]
        if getattr(getattr(network, "config", None), "model_type", None) in _MAMBA:
            found = [name for name in found if not name.endswith((".out_proj", ".dt_proj"))]
        experts = _taken_for_experts(network, found)
        found = [name for name in found if name not in experts]
        if not found:
            raise ModelError(
                "lora.target_modules: all-linear matches no module; the linears here are"
                f" {linear_names(network)}"
            )
        _say_what_is_left_out(network, found)
        return found
    for target in [targets] if isinstance(targets, str) else targets or [""]:
        if not any(_pattern(target, isinstance(targets, str)).fullmatch(name) for name in names):
            raise ModelError(
                f"lora.target_modules: {target or targets} matches no module; the linears here are"
                f" {linear_names(network)}"
            )
    patterns = [
        _pattern(target, isinstance(targets, str))
        for target in ([targets] if isinstance(targets, str) else targets)
    ]
    found = [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]
    for name in found:
        module = network.get_submodule(name)
        if not is_linear(module):
            raise ModelError(
                f"lora.target_modules: {name} is no linear but {type(module).__name__}"
            )
        _refuse_shared(network, name, module)
    experts = _taken_for_experts(network, found)
    if experts:
        raise ModelError(
            f"lora.target_modules: PEFT takes {min(experts)} for weights of experts in this"
            " architecture and would not load it again; leave"
            f" {', '.join(sorted({name.rpartition('.')[2] for name in experts}))} out"
        )
    return found


def short_names(network: nn.Module, targets: Collection[str]) -> list[str]:
    """Short names for the targets, sorted.

    They are the last parts of the names when these match the targets and no other module, else the
    full names.
    """
    ends = sorted({name.rpartition(".")[2] for name in targets})
    meant = {name for name, _ in network.named_modules() if name.rpartition(".")[2] in ends}
    return ends if meant == set(targets) else sorted(targets)


def linear_names(network: nn.Module) -> str:
    """The last parts of all linears' names, for a message."""
    return _last_parts(
        name for name, module in network.named_modules() if isinstance(module, LINEAR)
    )


def _last_parts(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _within(name: str, head: Sequence[str]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in head)


def _pattern(target: str, is_regex: bool, key: str = "target_modules") -> re.Pattern[str]:
    try:
        return re.compile(target if is_regex else f"(.*\\.)?{re.escape(target)}")
    except re.error as error:
        raise ModelError(
            f"lora.{key}: {target} is no regex ({error}); give names in a list, or fix it"
        ) from error


def _taken_for_experts(network: nn.Module, names: Sequence[str]) -> set[str]:
    """The linears that PEFT takes for weights of experts, because of their names.

    transformers 5 keeps the weights of all experts in one tensor, and PEFT renames such targets.
    """
    if not hasattr(network, "config"):
        return set()
    trial = peft.LoraConfig(target_modules=list(names))
    try:
        convert_peft_config_for_transformers(trial, network, None)
    except ValueError as error:  # PEFT fuses two targets, and only one of them is named
        raise ModelError(f"lora.target_modules: {error}") from error
    return set(names) - set(trial.target_modules or ())


def _refuse_shared(network: nn.Module, name: str, module: nn.Module) -> None:
    for other, sharer in network.named_modules():
        if sharer is not module and getattr(sharer, "weight", None) is module.weight:
            raise ModelError(
                f"lora.target_modules: {name} shares its weight with {other} (tie_word_embeddings):"
                f" merged, its update would change both; leave {name.rpartition('.')[2]} out"
            )


def _say_what_is_left_out(network: nn.Module, targets: Sequence[str]) -> None:
    lists = block_lists(network)
    linears = {
        name: module for name, module in network.named_modules() if isinstance(module, LINEAR)
    }
    reached, left, whole = set(targets), set[str](), 0
    within = 0
    for name, parameter in network.named_parameters():
        module, _, end = name.rpartition(".")
        if not name.startswith(lists) or (parameter.dim() < 2 and module not in linears):
            continue
        size = parameter.numel()
        # 4-bit weights are packed, so numel() is too small; the layer has the real shape
        if module in linears and end == "weight":
            layer = linears[module]
            size = layer.in_features * layer.out_features if hasattr(layer, "in_features") else size
        elif module in linears:
            continue
        whole += size
        if module in reached:
            within += size
        else:
            left.add(".".join(part for part in name.split(".")[-4:] if not part.isdigit()))
    if whole and within < _WORTH_SAYING * whole:
        shown = ", ".join(sorted(left)[:4]) + (" and others" if len(left) > 4 else "")
        warnings.warn(
            f"lora.target_modules all-linear reaches {100 * within / whole:.0f} % of the weights of"
            f" the blocks: {shown} are no linears that an adapter can stand on, and stay frozen",
            stacklevel=2,
        )
