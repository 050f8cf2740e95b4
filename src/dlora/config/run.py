"""What the user decides: frozen pydantic models, units in names, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dlora.config.arms import Baseline
from dlora.config.names import why_unsafe
from dlora.config.reading import Document, Section, Text

Quantization = Literal["none", "int8", "nf4"]


_NOT_YET = {  # PEFT's keys that people will write -> what is so, and what to do instead
    "use_dora": "dlora does not do DoRA yet; leave it out",
    "use_rslora": (
        "dlora does not do rsLoRA yet; the same scaling is lora_alpha x sqrt(r), written as"
        " lora_alpha"
    ),
    "rank_pattern": "dlora gives every linear the same rank; set r, and name fewer target_modules",
    "alpha_pattern": "dlora gives every linear the same scaling; set lora_alpha",
    "bias": "dlora trains no biases of the model, which is PEFT's bias: none; leave it out",
    "init": (
        "dlora draws A by the seed, B is zero; for the weight's own directions take placement: core"
    ),
    "init_lora_weights": (
        "dlora draws A by the seed, B is zero; for the weight's own directions take placement: core"
    ),
    "adapter": (
        "dlora does not go on from an adapter yet; merge it into its model (PEFT's"
        " merge_and_unload) and give that"
    ),
    "modules_to_save": (
        "dlora trains a classifier's new head (train_head) and no other module; leave it out"
    ),
    "target_parameters": "dlora adapts linears only; name them in target_modules",
    "exclude_modules": "dlora takes what target_modules names; write that as names or as a regex",
    "layers_to_transform": (
        "dlora takes what target_modules names; write the layers into a regex there"
    ),
    "task_type": "dlora takes it from task; leave it out",
}


class LoraSection(Section):
    """The shape of the adapter; names and meaning are PEFT's."""

    r: int = Field(8, ge=1, description="rank of every pair (A, B)")
    lora_alpha: float = Field(16, gt=0, description="scaling = lora_alpha / r")
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "`simulate` draws one mask for all; with peers.group_size 1 one for each, as real"
            " peers do"
        ),
    )
    target_modules: Literal["all-linear"] | tuple[Text, ...] | Text = Field(
        "all-linear",
        description=(
            "all-linear: the linears of the transformer blocks; else names or one regex, as in PEFT"
        ),
    )
    train_head: bool = Field(
        True, description="classification: train, mix and send the new head too"
    )
    placement: Literal["literal", "core"] = Field(
        "literal",
        description=(
            "literal: A and B train; core: both are the weight's own top directions, an r x r core"
            " trains"
        ),
    )
    frame: Text | None = Field(
        None,
        min_length=1,
        description=(
            "core: the file of these directions; read, or written if it is not there; null:"
            " computed from the model"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _not_yet(cls, tree: Any) -> Any:
        for key in tree if isinstance(tree, dict) else ():
            if key in _NOT_YET:
                raise ValueError(f"{key}: {_NOT_YET[key]}")
        return tree

    @model_validator(mode="after")
    def _frame_of_a_core(self) -> LoraSection:
        if self.frame is not None and self.placement != "core":
            raise ValueError("frame belongs to placement core; remove it")
        return self


class PartitionSection(Section):
    """Whose rows are whose."""

    kind: Literal["iid", "dirichlet", "label-shares", "by-column", "files"] = Field(
        "iid",
        description=(
            "how rows become the peers'; files: each peer has its own, data.train is {peer: file}"
        ),
    )
    concentration: float | None = Field(
        None, gt=0, description="dirichlet: small is skewed (0.1), large is iid"
    )
    min_rows: int = Field(
        1, ge=1, description="dirichlet: redraw until every peer has this many rows"
    )
    shares: tuple[tuple[float, ...], ...] | None = Field(
        None,
        description=(
            "label-shares: one row a peer, one column a label: the make-up of that peer's data"
        ),
    )
    column: Text | None = Field(
        None, description="by-column: the column whose values name the clients"
    )
    sizes: tuple[float, ...] | None = Field(
        None, description="iid, label-shares: relative number of rows a peer"
    )

    @model_validator(mode="after")
    def _needs(self) -> PartitionSection:
        if any(size <= 0 for size in self.sizes or ()):
            raise ValueError(f"sizes must all be above 0, got {min(self.sizes or ()):g}")
        owner = {
            "concentration": ("dirichlet",),
            "shares": ("label-shares",),
            "column": ("by-column",),
            "sizes": ("iid", "label-shares"),
        }
        for key, kinds in owner.items():
            given = getattr(self, key) is not None
            if given and self.kind not in kinds:
                raise ValueError(
                    f"{key} belongs to kind {' or '.join(kinds)}, not to {self.kind}; remove it"
                )
            if not given and self.kind in kinds and key != "sizes":
                raise ValueError(f"kind {self.kind} needs {key}")
        return self


class DataSection(Section):
    """The text, its columns and how it is divided."""

    train: Text | dict[Text, Text] = Field(
        description="jsonl, json, csv, tsv, parquet (also .gz), a hub name, or {peer: file}"
    )
    eval: Text | dict[Text, Text] = Field(
        description="what every score is measured on; same forms as train"
    )
    columns: tuple[Text, ...] | None = Field(
        None, description="names of the columns of a csv or tsv without a header"
    )
    text: Text | tuple[Text, Text] = Field(
        "text", description="classification: one column, or two for pairs"
    )
    label: Text = Field("label", description="classification: the column of the label")
    labels: tuple[Text, ...] | None = Field(
        None, description="names in order; null: those of the training data, sorted"
    )
    no_label: tuple[Text, ...] | None = Field(
        None,
        description=(
            "classification: labels that mean none, such as ['-1', '-']; rows with one of them, or"
            " with no value, are left out; null: every row needs a label"
        ),
    )
    fold_system: bool = Field(
        False,
        description=(
            "chats: write the turn of the system into the first of the user, for templates without"
            " that role"
        ),
    )
    max_length: int = Field(128, ge=2, description="tokens; longer examples are cut")
    limit: int | None = Field(None, ge=1, description="training rows, drawn by the seed; null: all")
    eval_limit: int | None = Field(
        None, ge=1, description="evaluation rows, drawn by the seed; null: all"
    )
    partition: PartitionSection = PartitionSection()

    @model_validator(mode="after")
    def _files(self) -> DataSection:
        if self.train == {}:
            raise ValueError("train names no peer; expected {peer: file}")
        if isinstance(self.train, dict) and (wrong := why_unsafe(tuple(self.train))):
            raise ValueError(f"train: the peer {wrong}")
        if both := sorted(set(self.labels or ()) & set(self.no_label or ())):
            raise ValueError(
                f"labels and no_label both name {both[0]!r}; a label is a class or stands for none"
            )
        if isinstance(self.train, dict) != (self.partition.kind == "files"):
            raise ValueError(
                "train: {peer: file} and partition: {kind: files} go together; give both or neither"
            )
        return self


class TrainSection(Section):
    """Local training between two exchanges; names and meaning are those of transformers'
    TrainingArguments.
    """

    rounds: int = Field(20, ge=1, description="exchanges with the neighbours")
    local_steps: int | None = Field(
        None, ge=1, description="optimiser steps a peer between two exchanges (default 5)"
    )
    local_epochs: float | None = Field(
        None, gt=0, description="instead of local_steps: passes over the peer's own rows"
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="examples a peer and micro-batch")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="micro-batches in one optimiser step"
    )
    learning_rate: float = Field(1e-3, gt=0, description="the highest of the run")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw, or sgd without momentum"
    )
    optimizer_state: Literal["keep", "reset"] = Field(
        "keep", description="AdamW's moments after a mix: kept, or set to zero"
    )
    weight_decay: float = Field(0.0, ge=0, description="of everything that trains")
    max_grad_norm: float | None = Field(1.0, gt=0, description="per participant; null: no clipping")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the learning rate falls over the run"
    )
    warmup_steps: int = Field(
        0, ge=0, description="local steps over which the learning rate rises from 0"
    )
    model_dropout: float | None = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "dropout inside the frozen model; null: what its own config says; see lora_dropout"
        ),
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice to keep fewer"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> TrainSection:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("local_steps and local_epochs are two ways to say one thing; keep one")
        if self.local_steps is None and self.local_epochs is None:
            object.__setattr__(self, "local_steps", 5)
        return self


class TopologySection(Section):
    """Who talks to whom."""

    kind: Literal[
        "ring", "complete", "erdos-renyi", "exponential", "hypercube", "base-k", "edges"
    ] = Field("ring", description="the graph of neighbours; `dlora topology KIND` shows it")
    p: float | None = Field(None, gt=0, le=1, description="erdos-renyi: probability of an edge")
    seed: int | None = Field(
        None,
        ge=0,
        description="erdos-renyi: the first connected graph from this seed on (default 0)",
    )
    k: int | None = Field(None, ge=1, description="base-k: neighbours a round, at most (default 1)")
    edges: tuple[tuple[Text | int, Text | int], ...] | None = Field(
        None, description="edges: pairs of peers, by name or index"
    )

    @model_validator(mode="after")
    def _needs(self) -> TopologySection:
        for key, kind in {
            "p": "erdos-renyi",
            "seed": "erdos-renyi",
            "k": "base-k",
            "edges": "edges",
        }.items():
            if getattr(self, key) is not None and self.kind != kind:
                raise ValueError(f"{key} belongs to kind {kind}, not to {self.kind}; remove it")
            if getattr(self, key) is None and self.kind == kind and key in ("p", "edges"):
                raise ValueError(f"kind {kind} needs {key}")
        return self


class PeersSection(Section):
    """The participants and how they agree."""

    count: int | None = Field(
        None,
        ge=1,
        description=(
            "how many; iid and dirichlet need it; null: as many as shares, sizes, files or column"
            " values"
        ),
    )
    topology: TopologySection = TopologySection()
    weights: Literal["metropolis", "laplacian"] | None = Field(
        None,
        description=(
            "null: metropolis, or what the topology fixes; laplacian: the paper's I - 2L/(3"
            " lambda_max)"
        ),
    )
    rule: Literal["factor", "ffa", "alternate"] = Field(
        "factor",
        description=(
            "factor: the paper; ffa: A frozen; alternate: one factor trains, both are mixed"
        ),
    )
    period: int = Field(
        5, ge=1, description="rule alternate: rounds after which the other factor trains"
    )
    wire: Literal["float32", "bfloat16"] = Field("float32", description="dtype of what is sent")
    members: tuple[Text, ...] | None = Field(
        None, description="names instead of a count: who takes part (`dlora peer`)"
    )
    silence_s: float = Field(
        60,
        gt=0,
        description="a neighbour from which nothing comes for so long is left out of the round",
    )
    round_limit_s: float = Field(
        3600, gt=0, description="the longest a round waits for a neighbour, whatever still comes"
    )
    catch_up_after: int = Field(
        10, ge=1, description="rounds behind its neighbours after which a peer takes their state"
    )
    group_size: int | None = Field(
        None,
        ge=1,
        description=(
            "participants in one forward; null: as many as fit; one where the model would mix their"
            " rows"
        ),
    )

    @model_validator(mode="after")
    def _who(self) -> PeersSection:
        if self.members is not None and self.count is not None:
            raise ValueError("members and count are two ways to say who takes part; keep one")
        twice = sorted(
            {name for name in self.members or () if (self.members or ()).count(name) > 1}
        )
        if twice:
            raise ValueError(f"members names {twice[0]} twice; name each peer once")
        if self.members is not None and not self.members:
            raise ValueError("members names nobody; name those who take part, or remove it")
        if wrong := why_unsafe(self.members or ()):
            raise ValueError(f"members: {wrong}")
        return self


class SplitSection(Section):
    """The frozen model elsewhere: data, labels, factors and head stay here."""

    cloud: Text = Field(
        min_length=1,
        description="the member that runs the frozen model, by its name in the federation",
    )
    wire: Literal["float32", "bfloat16", "int8"] = Field(
        "bfloat16",
        description=(
            "dtype of hidden states and updates on their way; int8: dynamic, a scale for each token"
        ),
    )
    pipeline: int = Field(
        1,
        ge=1,
        description="micro-batches on their way at once, so that the cloud works while one travels",
    )
    silence_s: float = Field(
        60,
        gt=0,
        description=(
            "a cloud that gives no answer for so long is reported; its devices are away for their"
            " neighbours"
        ),
    )


class ScheduleSection(Section):
    """Which units train now. A unit is a group of modules that share one input: query, key and
    value; gate and up; ...

    A key that a kind does not use has no effect, so that one file serves all kinds: `--set
    schedule.kind=all`. Only `units` is refused.
    """

    kind: Literal["all", "static", "random", "probe", "kr"] = Field(
        "all",
        description=(
            "kr: Kill and Revive; static: the units named; random: drawn anew; probe: chosen once"
        ),
    )
    active_fraction: float = Field(
        0.125,
        gt=0,
        le=1,
        description=(
            "kr, random, probe: the part of the adapter traffic that the active units may have"
            " together; one unit is always active, even if it has more"
        ),
    )
    on_kill: Literal["hand-off", "drop"] = Field(
        "hand-off",
        description=(
            "factors of a killed unit; hand-off: the model still uses them, and a cloud is sent"
            " them; drop: they are kept on the device, and the model does not use them"
        ),
    )
    period: int = Field(
        100,
        ge=1,
        description=(
            "random: local steps between two draws; kr: local steps between the starts of two"
            " trials"
        ),
    )
    warmup_steps: int = Field(
        80,
        ge=1,
        description=(
            "local steps; kr: of the first rotation, which tries every unit; probe: with all units"
            " active"
        ),
    )
    rewarm_steps: int = Field(
        5, ge=1, description="local steps over which a revived unit's learning rate rises again"
    )
    units: tuple[Text, ...] | None = Field(
        None,
        description=(
            "static: names of modules, or the ends of names; the units that hold them are active"
        ),
    )

    @model_validator(mode="after")
    def _needs(self) -> ScheduleSection:
        if self.kind == "static" and not self.units:
            raise ValueError(
                "kind static needs units: the names of modules that train, such as"
                " [layer.5.attention.self.query]"
            )
        if self.kind != "static" and self.units is not None:
            raise ValueError(f"units belongs to kind static, not to {self.kind}; remove it")
        return self


class Config(Document):
    """One run. `Config.load` reads it from YAML; every field has a default that works but `model`'s
    and `data`'s.
    """

    model: Text = Field(
        description="a hub name, a folder, or pkg://package/folder inside an installed package"
    )
    task: Literal["classification", "causal-lm"] = Field(
        "classification",
        description="classification: one label for a text; causal-lm: a model that writes text",
    )
    pooling: Literal["mean"] | None = Field(
        None,
        description=(
            "classification: null is the model's own head; mean: mean over tokens and one linear"
            " (sentence encoders)"
        ),
    )
    quantization: Quantization = Field(
        "none", description="of the frozen base only; needs dlora[4bit]"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast; what trains stays float32"
    )
    device: Text = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection = TrainSection()
    peers: PeersSection = PeersSection()
    schedule: ScheduleSection = ScheduleSection()
    split: SplitSection | None = Field(
        None, description="the frozen model runs in this member's cloud; null: here"
    )
    eval_every: int = Field(
        5, ge=0, description="rounds between scores of the average; 0: at the end only"
    )
    eval_peers_every: int = Field(
        0, ge=0, description="rounds between scores of each peer's own; 0: at the end only"
    )
    eval_peers: Literal["all", "none"] | Annotated[int, Field(ge=1)] = Field(
        "all",
        description=(
            "whose own scores: all, none, or of so many, drawn by the seed (their mean with its"
            " standard error)"
        ),
    )
    per_device_eval_batch_size: int = Field(
        64, ge=1, description="examples that are scored at once"
    )
    save_every: int = Field(
        5, ge=1, description="rounds between checkpoints; the last two are kept"
    )
    compare: tuple[Baseline, ...] = Field((), description="baselines on the same data and seed")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of initial factors, order of rows, dropout and partition"
    )
    output_dir: Text = Field(
        "runs/run", description="the folder of the run; it must not hold another"
    )

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if len(set(self.compare)) != len(self.compare):
            raise ValueError("compare names a baseline twice")
        if self.eval_peers == "none" and self.eval_peers_every:
            raise ValueError(
                f"eval_peers none switches off what eval_peers_every {self.eval_peers_every} asks"
                " for; remove one of them"
            )
        if self.task == "causal-lm" and self.pooling is not None:
            raise ValueError("pooling belongs to task classification; remove it")
        if self.task == "causal-lm" and self.data.partition.kind in ("dirichlet", "label-shares"):
            raise ValueError(
                f"partition {self.data.partition.kind} needs labels; causal-lm has none: take iid,"
                " by-column or files"
            )
        if self.lora.placement == "core" and self.peers.rule != "factor":
            raise ValueError(
                f"peers.rule {self.peers.rule} chooses between A and B, which placement core"
                " freezes both: averaging the cores is exact as it is; take rule factor"
            )
        if self.split is not None:
            self._check_split()
        return self

    def _hands_off(self) -> bool:
        return self.schedule.kind != "all" and self.schedule.on_kill == "hand-off"

    def _check_split(self) -> None:
        if self.train.gradient_checkpointing:
            raise ValueError(
                "split: the cloud runs the body, nothing is checkpointed here: remove"
                " train.gradient_checkpointing"
            )
        if self.lora.lora_dropout and (self.lora.placement == "core" or self._hands_off()):
            what = "placement core" if self.lora.placement == "core" else "on_kill hand-off"
            raise ValueError(
                f"lora.lora_dropout {self.lora.lora_dropout:g}: with {what} the cloud reads inputs"
                " itself and drops nothing; set it to 0"
            )
        if self.quantization != "none":
            raise ValueError(
                "split: the frozen body is the cloud's: quantise it in the cloud's own config,"
                " remove it here"
            )
        if self.peers.group_size not in (None, 1):
            raise ValueError(
                "split: each device's tokens travel by themselves: remove peers.group_size, which"
                f" is {self.peers.group_size}"
            )
