"""What a run loads before it starts: its rows, its graph, its frozen model, and the units of its
schedule.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from dlora.config.run import Config
from dlora.data.load import FederatedData, load_data, load_own_data
from dlora.decentralized.drawn import drawn_peers
from dlora.decentralized.topology import Topology, build_topology
from dlora.errors import ConfigError
from dlora.lora.active import named_units
from dlora.lora.adapt import adapt
from dlora.lora.adapter_io import BEGUN_FROM, begin_from
from dlora.lora.factors import target_ranks
from dlora.lora.sharded import ShardedModel
from dlora.lora.stacked import StackedModel
from dlora.lora.taken_out import kept_taken_out
from dlora.lora.units import Unit, adapted_units, bottleneck_units, core_units, find_units, renamed
from dlora.model.fingerprints import fingerprint
from dlora.model.load import body_maker, load_model, load_tokenizer, resolve_device
from dlora.model.shards import mesh_of_all
from dlora.run.core_directions import handed_directions, kept_directions, whole_directions
from dlora.run.ranks import Ranks
from dlora.split.device.half import Half, load_half


def read_all(config: Config, own: str | None, ranks: Ranks) -> tuple[Any, FederatedData, Topology]:
    """The tokenizer, the rows, and who exchanges with whom."""
    tokenizer = load_tokenizer(config.model)
    if own is None:
        data = load_data(
            config.data,
            config.task,
            config.peers.members or config.peers.count,
            tokenizer,
            config.seed,
        )
    else:
        data = load_own_data(
            config.data,
            config.task,
            own,
            tokenizer,
            config.seed,
            alone=config.peers.members is None,
        )
    for warning in data.warnings:
        warnings.warn(warning, stacklevel=3)
    names = (config.peers.members or (own,)) if own else tuple(data.peers)
    if own is None and len(data.peers) < ranks.size:
        raise ConfigError(
            f"{ranks.size} ranks share {len(data.peers)} peers, and each needs at least one:"
            f" start at most {len(data.peers)}, or raise peers.count"
        )
    if ranks.are_several and config.device_map is not None:
        raise ConfigError(
            "device_map: one process has the model on several devices; start one, or take"
            " shard_model, with which each process has a part"
        )
    rows_a_step = config.train.per_device_train_batch_size
    if own is not None and rows_a_step < ranks.size:
        raise ConfigError(
            f"{ranks.size} ranks share train.per_device_train_batch_size {rows_a_step}, and each"
            f" needs at least one row: start at most {rows_a_step}, or raise it"
        )
    topology = build_topology(config.peers.topology, config.peers.weights, names)
    _doubt_participation(config, topology)
    if config.shard_model and not ranks.are_several:
        warnings.warn(
            "shard_model: this is the only process, so it holds the whole model; torchrun starts"
            " several (docs/cluster.md)",
            stacklevel=3,
        )
    return tokenizer, data, topology


def shared_mesh(config: Config, ranks: Ranks) -> DeviceMesh:
    """The processes that share a frozen model. Raises ConfigError if they share a GPU."""
    device = resolve_device(config.device)
    if device.type != "cpu" and ranks.on_one_device(device) > 1:
        raise ConfigError(
            f"shard_model: {ranks.on_one_device(device)} ranks share one GPU, where parts of a"
            " model together are no smaller than the model: start one rank for each GPU"
        )
    return mesh_of_all(device)


def load_frozen(
    config: Config,
    tokenizer: Any,
    data: FederatedData,
    own: str | None,
    resume: bool,
    mesh: DeviceMesh | None,
    ranks: Ranks,
) -> tuple[StackedModel, str, Half | None]:
    """The model, the hash of the frozen weights that are here, and a device's half if there is one.

    ``mesh``: the processes that divide the frozen weights; None: each has the whole model.
    """
    if config.split is not None:
        directions = (
            kept_directions(config, resume) if own is None or resume else handed_directions(config)
        )
        # a simulation also has the weights, and can compute the directions
        if own is None and directions is None and config.lora.placement == "core":
            directions = whole_directions(config)
        half = load_half(config, tokenizer, data.label_names, directions)
        _begin(config, resume, half.model)
        return half.model, half.fingerprint, half
    # bitsandbytes quantises where it computes later
    whole_on = torch.device("cpu") if mesh and config.quantization == "none" else None
    frozen = load_model(config, tokenizer, data.label_names, device=whole_on)
    weights_hash = fingerprint(frozen.network, but=frozen.head)
    directions = kept_directions(config, resume)
    kept = kept_taken_out(Path(config.output_dir)) if resume else None
    model = adapt(frozen, config, directions, kept=kept)
    _begin(config, resume, model)
    if mesh is not None:
        model = ShardedModel.of(model, mesh, ranks.any)
    return model, weights_hash, None


def _begin(config: Config, resume: bool, model: StackedModel) -> None:
    """Let all begin with the adapter that the config names; a resumed run has a copy of it."""
    given = config.adapter_section.adapter
    if given is None:
        return
    kept = Path(config.output_dir, BEGUN_FROM)
    begin_from(kept if resume and kept.is_dir() else Path(given), model)


def _doubt_participation(config: Config, topology: Topology) -> None:
    """Warn if few edges mix, because the peers that are drawn are seldom neighbours."""
    peers = config.peers
    if peers.participation == 1:
        return
    count = topology.num_peers
    counts = [
        len(topology.edges_among(drawn_peers(peers.participation, count, config.seed, one), one))
        for one in range(min(20, config.train.rounds))
    ]
    mean = sum(counts) / len(counts)
    if mean < 1:
        warnings.warn(
            f"peers.participation {peers.participation:g} with topology {topology.kind}: an edge"
            f" needs both its ends, and only {mean:.1f} edges mix in a round on average; take"
            " topology complete, or a larger part",
            stacklevel=3,
        )


def _doubt_rank(initial: Mapping[str, torch.Tensor]) -> None:
    """Warn of a rank that is larger than the rows or columns of an adapted weight."""
    sizes = [
        (min(tensor.shape[-1], initial[f"{name[:-1]}B"].shape[-2]), tensor.shape[-2], name)
        for name, tensor in initial.items()
        if name.endswith("lora_A")
    ]
    too_large = [(smallest, r, name) for smallest, r, name in sizes if r > smallest]
    if too_large:
        smallest, r, name = min(too_large)
        warnings.warn(
            f"lora.r {r}: {name.removesuffix('.lora_A')} has only {smallest} rows or columns, a"
            " rank above that adds nothing",
            stacklevel=3,
        )


def scheduled_units(config: Config, model: StackedModel, half: Half | None) -> tuple[Unit, ...]:
    """The units that the schedule turns on and off. Raises ConfigError if one that the config names
    does not exist.
    """
    _doubt_rank(model.initial)
    units = _found_units(config, model, half) if config.schedule.kind != "all" else ()
    named_units(config.schedule.units or (), units)
    return units


def _found_units(config: Config, model: StackedModel, half: Half | None) -> tuple[Unit, ...]:
    prefix = f"{model.network.base_model_prefix}."
    if half is not None:
        return tuple(renamed(unit, prefix) for unit in half.agreement.units)
    units = [renamed(unit, prefix) for unit in find_units(body_maker(model.network))]
    ranks = target_ranks(model.initial)
    if config.bottleneck is not None:
        return bottleneck_units(units, ranks)
    adapted = adapted_units(units, ranks)
    return core_units(adapted) if config.lora.placement == "core" else adapted
