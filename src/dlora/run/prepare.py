"""Prepare a run: load data and model, build the topology, and find mistakes before it starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dlora.config.run import Config
from dlora.data.batches import BatchStream
from dlora.data.load import FederatedData, load_data, load_own_data
from dlora.decentralized.drawn import drawn_peers
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.peer.messages import WIRE_DTYPES, TensorMessages
from dlora.decentralized.topology import Topology, build_topology
from dlora.errors import ConfigError
from dlora.evaluate import Scored, evaluate
from dlora.lora.active import named_units
from dlora.lora.core import DIRECTIONS_FILE, write_directions
from dlora.lora.factors import digest, is_head, target_names
from dlora.lora.stacked import StackedModel, attach
from dlora.lora.units import Unit, adapted_units, core_units, find_units, renamed
from dlora.model.fingerprints import fingerprint, tokenizer_fingerprint
from dlora.model.load import body_maker, load_model, load_tokenizer
from dlora.run.core_directions import handed_directions, kept_directions, whole_directions
from dlora.run.ranks import ALONE, Ranks
from dlora.run.trial import try_model
from dlora.split.device.half import Half, load_half
from dlora.wire.tensors import message_num_bytes


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    config: Config
    data: FederatedData
    topology: Topology
    model: StackedModel
    streams: tuple[BatchStream, ...]  # one for each peer that trains here
    tokenizer: Any  # a tokenizer of transformers
    manifest: dict[str, Any]
    # units of the schedule, with module names as in the factors; empty without a schedule
    units: tuple[Unit, ...] = ()
    # scores of untrained factors, by the hash of the factors
    first_scores: dict[str, Scored] = field(default_factory=dict)
    # the device's half, if the frozen model runs in a cloud; it must be linked before training
    half: Half | None = None
    ranks: Ranks = ALONE

    @property
    def here(self) -> range:
        """The numbers of the participants that train in this process."""
        return self.ranks.block(len(self.names))

    def drawn(self, round: int) -> list[int]:
        """The numbers of the peers that take part in a round, in order."""
        config = self.config
        count = self.topology.num_peers
        return drawn_peers(config.peers.participation, count, config.seed, round)

    @property
    def names(self) -> tuple[str, ...]:
        """The peers of this run, in order: all peers of a simulation, or one real peer."""
        return tuple(self.data.peers)

    @property
    def pad_token_id(self) -> int:
        """The token that fills up the rows of a batch."""
        token: int = self.tokenizer.pad_token_id
        return token

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """bfloat16 if the config asks for it, else None."""
        return torch.bfloat16 if self.config.dtype == "bfloat16" else None

    @property
    def local_steps(self) -> list[int]:
        """Local steps of each peer in a round."""
        section = self.config.train
        if section.local_epochs is None:
            assert section.local_steps is not None  # config/run.py has checked this
            return [section.local_steps] * len(self.names)
        rows_a_step = section.per_device_train_batch_size * section.gradient_accumulation_steps
        return [
            max(1, math.ceil(section.local_epochs * len(rows) / rows_a_step))
            for rows in self.data.peers.values()
        ]

    def evaluate(
        self,
        factors: Mapping[str, torch.Tensor],
        on_batch: Callable[[int, int], None],
        killed: frozenset[int] = frozenset(),
        dealt: bool = False,
    ) -> list[Scored]:
        """Scores of each participant in ``factors``, (P, ...) each, on the evaluation data.

        ``on_batch(done, total)`` hears the progress. ``killed``: units that add nothing for these
        participants. ``dealt``: all ranks score the same factors, each on a part of the rows.
        """
        return evaluate(
            self.model,
            factors,
            self.data.evaluation,
            self.data.choices,
            pad_token_id=self.pad_token_id,
            batch_size=self.config.per_device_eval_batch_size,
            autocast_dtype=self.autocast_dtype,
            on_batch=on_batch,
            killed=killed,
            rank=self.ranks.rank if dealt else 0,
            ranks=self.ranks.size if dealt else 1,
            gathered=self.ranks.gathered if dealt else lambda own: [own],
        )

    @property
    def message_bytes(self) -> int:
        """Bytes of one serialised message with all tensors that train."""
        wire = WIRE_DTYPES[self.config.peers.wire]
        return message_num_bytes(
            {name: (wire, tuple(tensor.shape)) for name, tensor in self.trained.items()}
        )

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """The initial values of the tensors that train: all but a frozen head."""
        return {
            name: tensor
            for name, tensor in self.model.initial.items()
            if name not in self.model.frozen_head
        }

    @property
    def messages(self) -> TensorMessages:
        """What the messages between peers hold."""
        peers = self.config.peers
        return TensorMessages(
            shapes={name: tuple(tensor.shape) for name, tensor in self.trained.items()},
            rule=build_rule(peers),
            wire=WIRE_DTYPES[peers.wire],
            rounds=self.config.train.rounds,
            num_peers=self.topology.num_peers,
            leaves_out=self.config.schedule.kind != "all",
        )

    def hand_directions(self) -> None:
        """Under placement core: write the file that ``lora.frame`` names, if it does not exist."""
        given = self.config.lora.frame
        if self.model.directions and given and not Path(given).exists():
            write_directions(Path(given), self.model.directions)

    def keep_directions(self) -> None:
        """Under placement core: write the file of the run folder, if it does not exist."""
        path = Path(self.config.output_dir, DIRECTIONS_FILE)
        if self.model.directions and not path.exists():
            write_directions(path, self.model.directions)


def prepare(
    config: Config,
    phase: Callable[[str], object] = lambda text: None,
    own: str | None = None,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Read the data, build the topology, load the model.

    ``own``: the name of a real peer, which has only its own data; None: all peers of a simulation.
    ``resume``: core directions are read from the run folder. ``phase`` hears what is being loaded.
    ``ranks``: over which the participants are dealt; each has all rows and the whole model.
    Raises a UserError that names the mistake.
    """
    phase("reading data")
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
        warnings.warn(warning, stacklevel=2)
    names = (config.peers.members or (own,)) if own else tuple(data.peers)
    if len(data.peers) < ranks.size:
        raise ConfigError(
            f"{ranks.size} ranks share {len(data.peers)} peers, and each needs at least one:"
            f" start at most {len(data.peers)}, or raise peers.count"
        )
    topology = build_topology(config.peers.topology, config.peers.weights, names)
    _doubt_participation(config, topology)
    phase("loading model")
    half = None
    if config.split is not None:
        directions = (
            kept_directions(config, resume) if own is None or resume else handed_directions(config)
        )
        # a simulation also has the weights, and can compute the directions
        if own is None and directions is None and config.lora.placement == "core":
            directions = whole_directions(config)
        half = load_half(config, tokenizer, data.label_names, directions)
        model: StackedModel = half.model
        weights_hash = half.fingerprint
    else:
        frozen = load_model(config, tokenizer, data.label_names)
        weights_hash = fingerprint(frozen.network, but=frozen.head)
        model = attach(
            frozen, config.lora, config.task, config.seed, kept_directions(config, resume)
        )
        try_model(model, next(iter(data.peers.values()))[:2], tokenizer.pad_token_id, config.model)
    _doubt_rank(config.lora.r, model.initial)
    units = () if config.schedule.kind == "all" else _units(config, model, half)
    named_units(config.schedule.units or (), units)  # raises an error if a unit does not exist
    manifest: dict[str, Any] = {
        "model": weights_hash,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "task": config.task,
        "pooling": config.pooling,
        "quantization": config.quantization,
        "labels": data.label_names,
        "max_length": config.data.max_length,
        "lora": {
            "r": config.lora.r,
            "lora_alpha": config.lora.lora_alpha,
            "targets": target_names(model.initial),
        },
        "train_head": config.lora.train_head and any(is_head(name) for name in model.initial),
        "initial_factors": digest(model.initial | model.head_rest),
        "topology": config.peers.topology.model_dump(mode="json", exclude_none=True),
        "weights": config.peers.weights,
        "peers": names,
        "rule": config.peers.rule,
        "period": config.peers.period if config.peers.rule == "alternate" else None,
        "wire": config.peers.wire,
    }
    if config.peers.overlap:
        manifest["overlap"] = True
    if config.peers.participation < 1:
        manifest["participation"] = config.peers.participation
    if config.lora.placement == "core":
        manifest["lora"]["placement"] = "core"
        manifest["frame"] = digest(model.directions)
    if config.schedule.kind != "all":
        manifest["schedule"] = config.schedule.model_dump(mode="json", exclude_none=True)
    streams = tuple(BatchStream(len(rows), config.seed, name) for name, rows in data.peers.items())
    return Prepared(
        config,
        data,
        topology,
        model,
        streams,
        tokenizer,
        manifest,
        units,
        half=half,
        ranks=ranks,
    )


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


def _doubt_rank(r: int, initial: Mapping[str, torch.Tensor]) -> None:
    """Warn of a rank that is larger than the rows or columns of an adapted weight."""
    pairs = [
        (name, initial[name], initial[f"{name[:-1]}B"])
        for name in initial
        if name.endswith("lora_A")
    ]
    smallest, where = min(
        ((min(a.shape[-1], b.shape[-2]), name) for name, a, b in pairs), default=(r, "")
    )
    if r > smallest:
        where = where.removesuffix(".lora_A")
        warnings.warn(
            f"lora.r {r}: {where} has only {smallest} rows or columns, a rank above that adds"
            " nothing",
            stacklevel=3,
        )


def _units(config: Config, model: StackedModel, half: Half | None) -> tuple[Unit, ...]:
    """The units that the schedule turns on and off."""
    prefix = f"{model.network.base_model_prefix}."
    if half is not None:
        return tuple(renamed(unit, prefix) for unit in half.agreement.units)
    units = [renamed(unit, prefix) for unit in find_units(body_maker(model.network))]
    adapted = adapted_units(units, target_names(model.initial))
    return core_units(adapted, config.lora.r) if config.lora.placement == "core" else adapted
