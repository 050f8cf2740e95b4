"""Prepare a run: load data and model, build the topology, and find mistakes before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dlora.config.run import Config
from dlora.config.tasks import TASKS
from dlora.data.batches import BatchStream
from dlora.data.load import FederatedData
from dlora.decentralized.drawn import drawn_peers
from dlora.decentralized.mixing import build_rule
from dlora.decentralized.peer.messages import WIRE_DTYPES, TensorMessages
from dlora.decentralized.topology import Topology
from dlora.errors import ModelError
from dlora.evaluate import evaluate
from dlora.lora.adapter_io import keep_begun
from dlora.lora.core import DIRECTIONS_FILE, write_directions
from dlora.lora.factors import digest, is_head, target_ranks
from dlora.lora.stacked import StackedModel
from dlora.lora.taken_out import keep_taken_out
from dlora.lora.units import Unit
from dlora.model.fingerprints import tokenizer_fingerprint
from dlora.run.loading import load_frozen, read_all, scheduled_units, shared_mesh
from dlora.run.ranks import ALONE, Ranks
from dlora.run.trial import try_model
from dlora.split.device.half import Half
from dlora.tasks.generation import Writing, writing_of
from dlora.tasks.scores import Scored
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
    # the processes that train one real peer together
    site: Ranks = ALONE

    @property
    def processes(self) -> Ranks:
        """All processes of this run that torchrun started."""
        return self.site if self.site.are_several else self.ranks

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

    @cached_property
    def writing(self) -> Writing | None:
        """What the model is asked to write to be scored; None: nothing."""
        return writing_of(self.config.generation, self.data.evaluation, self.tokenizer)

    @property
    def metric(self) -> str:
        """The score that decides which adapter is best."""
        asked = self.writing.section.scores if self.writing else ()
        task = TASKS[self.config.task]
        return task.metric(bool(self.data.choices), self.data.label_names, asked)

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
        participants. ``dealt``: all processes score the same factors, each on a part of the rows.
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
            rank=self.processes.rank if dealt else 0,
            ranks=self.processes.size if dealt else 1,
            gathered=self._gathered if dealt else lambda own: [own],
            writing=self.writing,
        )

    def _gathered(self, found: Any) -> list[Any]:
        self.model.passes_done(backward=False)
        return self.processes.gathered(found)

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

    def keep_adapter(self) -> None:
        """Copy the adapter from which all begin into the run folder, if it is not there yet."""
        given = self.config.adapter_section.adapter
        if given is not None:
            keep_begun(Path(given), Path(self.config.output_dir))

    def keep_taken_out(self) -> None:
        """Write what PiSSA or OLoRA took out of the weights into the run folder, if it is not there
        yet.
        """
        keep_taken_out(Path(self.config.output_dir), self.model.taken_out)

    def keep_directions(self) -> None:
        """Under placement core: write the file of the run folder, if it does not exist."""
        path = Path(self.config.output_dir, DIRECTIONS_FILE)
        if self.model.directions and not path.exists():
            write_directions(path, self.model.directions)


def _try(
    config: Config,
    model: StackedModel,
    data: FederatedData,
    tokenizer: Any,
    ranks: Ranks,
    divided: str | None,
) -> None:
    """Raise ModelError if the model cannot be trained. ``divided``: the hash of a model that the
    ranks have divided; then they make one pass together, and all fail or none does.
    """

    def tried() -> None:
        rows = next(iter(data.peers.values()))[:2]
        try_model(model, rows, tokenizer.pad_token_id, config.model)

    if divided is None:
        ranks.together(tried)
        return
    if len(set(ranks.gathered(divided))) > 1:
        raise ranks.told_once(
            ModelError(
                f"model {config.model}: the ranks read different weights, so that they cannot share"
                " one model; give all machines the same files"
            )
        )
    try:
        tried()
    except ModelError as error:
        raise ranks.told_once(error) from error


def _adapter_facts(config: Config, targets: list[str]) -> dict[str, Any]:
    """What the manifest says of the adapter."""
    if config.peft is not None:
        return {"peft": config.peft}
    if (section := config.bottleneck) is not None:
        bottleneck = {"r": section.r, "activation": section.activation, "targets": targets}
        return {"bottleneck": bottleneck}
    lora = config.lora
    facts: dict[str, Any] = {"r": lora.r, "lora_alpha": lora.lora_alpha, "targets": targets}
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if value := getattr(lora, key):
            facts[key] = value
    if lora.bias != "none":
        facts["bias"] = lora.bias
    if lora.placement == "core":
        facts["placement"] = "core"
    return {"lora": facts}


def prepare(
    config: Config,
    phase: Callable[[str], object] = lambda text: None,
    own: str | None = None,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Read the data, build the topology, load the model.

    ``own``: the name of a real peer, which has only its own data; None: all peers of a simulation.
    ``resume``: core directions, and what PiSSA or OLoRA took out of the weights, are read from the
    run folder. ``phase`` hears what is being loaded.
    ``ranks``: the processes that call this together: those over which the participants are dealt,
    each with all rows, or those that train the real peer ``own`` together. Raises a UserError that
    names the mistake.
    """
    everyone, (site, ranks) = ranks, (ranks, ALONE) if own else (ALONE, ranks)
    phase("reading data")
    tokenizer, data, topology = everyone.together(lambda: read_all(config, own, everyone))
    phase("loading model")
    sharded = config.shard_model and everyone.are_several
    mesh = everyone.together(lambda: shared_mesh(config, everyone)) if sharded else None
    model, weights_hash, half = everyone.together(
        lambda: load_frozen(config, tokenizer, data, own, resume, mesh, everyone), in_turns=sharded
    )
    if half is None:
        _try(config, model, data, tokenizer, everyone, weights_hash if sharded else None)
    writing_of(config.generation, data.evaluation, tokenizer)  # refuses rows without a prompt
    units = everyone.together(lambda: scheduled_units(config, model, half))
    manifest: dict[str, Any] = {
        "model": weights_hash,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "task": config.task,
        "pooling": config.pooling,
        "quantization": config.quantization,
        "labels": data.label_names,
        "max_length": config.data.max_length,
        **_adapter_facts(config, sorted(target_ranks(model.initial))),
        "train_head": config.adapter_section.train_head
        and any(is_head(name) for name in model.initial),
        "initial_factors": digest(model.initial | model.head_rest),
        "topology": config.peers.topology.model_dump(mode="json", exclude_none=True),
        "weights": config.peers.weights,
        "peers": topology.names,
        "rule": config.peers.rule,
        "period": config.peers.period if config.peers.rule == "alternate" else None,
        "wire": config.peers.wire,
    }
    if config.peers.overlap:
        manifest["overlap"] = True
    if config.peers.participation < 1:
        manifest["participation"] = config.peers.participation
    if config.lora.placement == "core":
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
        site=site,
    )
