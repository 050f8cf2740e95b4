"""What the user decides: frozen pydantic models, units in names, unknown keys refused."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dlora.errors import ConfigError

Baseline = Literal["pooled", "local", "fedavg"]


class _Section(BaseModel):
    """One block of the YAML: immutable, and every key in it is a known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


S = TypeVar("S", bound=_Section)


class LoraSection(_Section):
    """The shape of the adapter; names and meaning are PEFT's."""

    r: int = Field(8, ge=1, description="rank of every pair (A, B)")
    lora_alpha: float = Field(16, gt=0, description="scaling = lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] | str = Field(
        "all-linear", description="all-linear: the linears of the transformer blocks; else names or one regex, as in PEFT"
    )
    train_head: bool = Field(True, description="classification: train, mix and send the new head too")


class PartitionSection(_Section):
    """Whose rows are whose."""

    kind: Literal["iid", "dirichlet", "label-shares", "by-column", "files"] = "iid"
    concentration: float | None = Field(None, gt=0, description="dirichlet: small is skewed (0.1), large is iid")
    min_rows: int = Field(1, ge=1, description="dirichlet: redraw until every peer has this many rows")
    shares: tuple[tuple[float, ...], ...] | None = Field(
        None, description="label-shares: one row a peer, one column a label: the make-up of that peer's data"
    )
    column: str | None = Field(None, description="by-column: the column whose values name the clients")
    sizes: tuple[float, ...] | None = Field(None, description="iid, label-shares: relative number of rows a peer")

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
                raise ValueError(f"{key} belongs to kind {' or '.join(kinds)}, not to {self.kind}; remove it")
            if not given and self.kind in kinds and key != "sizes":
                raise ValueError(f"kind {self.kind} needs {key}")
        return self


class DataSection(_Section):
    """The text, its columns and how it is divided."""

    train: str | dict[str, str] = Field(description="jsonl, json, csv, tsv, parquet (also .gz), a hub name, or {peer: file}")
    eval: str | dict[str, str] = Field(description="what every score is measured on; same forms as train")
    columns: tuple[str, ...] | None = Field(None, description="names of the columns of a csv or tsv without a header")
    text: str | tuple[str, str] = Field("text", description="classification: one column, or two for pairs")
    label: str = Field("label", description="classification: the column of the label")
    labels: tuple[str, ...] | None = Field(None, description="names in order; null: those of the training data, sorted")
    max_length: int = Field(128, ge=2, description="tokens; longer examples are cut")
    limit: int | None = Field(None, ge=1, description="training rows, drawn by the seed; null: all")
    eval_limit: int | None = Field(None, ge=1, description="evaluation rows, drawn by the seed; null: all")
    partition: PartitionSection = PartitionSection()

    @model_validator(mode="after")
    def _files(self) -> DataSection:
        if self.train == {}:
            raise ValueError("train names no peer; expected {peer: file}")
        if isinstance(self.train, dict) != (self.partition.kind == "files"):
            raise ValueError("train: {peer: file} and partition: {kind: files} go together; give both or neither")
        return self


class TrainSection(_Section):
    """Local training between two exchanges; names and meaning are those of transformers' TrainingArguments."""

    rounds: int = Field(20, ge=1, description="exchanges with the neighbours")
    local_steps: int | None = Field(None, ge=1, description="optimiser steps a peer between two exchanges (default 5)")
    local_epochs: float | None = Field(None, gt=0, description="instead of local_steps: passes over the peer's own rows")
    per_device_train_batch_size: int = Field(8, ge=1, description="examples a peer and micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    optimizer_state: Literal["keep", "reset"] = Field("keep", description="the moments after a mix: kept or zeroed")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="per participant; null: no clipping")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="local steps over which the learning rate rises from 0")
    model_dropout: float | None = Field(0.0, ge=0, lt=1, description="of the frozen model; null: the model's own")
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_unit(self) -> TrainSection:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("local_steps and local_epochs are two ways to say one thing; keep one")
        if self.local_steps is None and self.local_epochs is None:
            object.__setattr__(self, "local_steps", 5)
        return self


class TopologySection(_Section):
    """Who talks to whom."""

    kind: Literal["ring", "complete", "erdos-renyi", "exponential", "hypercube", "base-k", "edges"] = "ring"
    p: float | None = Field(None, gt=0, le=1, description="erdos-renyi: probability of an edge")
    seed: int | None = Field(None, ge=0, description="erdos-renyi: the first connected graph from this seed on (default 0)")
    k: int | None = Field(None, ge=1, description="base-k: neighbours a round, at most (default 1)")
    edges: tuple[tuple[str | int, str | int], ...] | None = Field(None, description="edges: pairs of peers, by name or index")

    @model_validator(mode="after")
    def _needs(self) -> TopologySection:
        for key, kind in {"p": "erdos-renyi", "seed": "erdos-renyi", "k": "base-k", "edges": "edges"}.items():
            if getattr(self, key) is not None and self.kind != kind:
                raise ValueError(f"{key} belongs to kind {kind}, not to {self.kind}; remove it")
            if getattr(self, key) is None and self.kind == kind and key in ("p", "edges"):
                raise ValueError(f"kind {kind} needs {key}")
        return self


class PeersSection(_Section):
    """The participants and how they agree."""

    count: int | None = Field(
        None, ge=1, description="null: as many as the partition names (shares, sizes, files, column values)"
    )
    topology: TopologySection = TopologySection()
    weights: Literal["metropolis", "laplacian"] | None = Field(
        None, description="null: metropolis, or what the topology fixes; laplacian: the paper's I - 2L/(3 lambda_max)"
    )
    rule: Literal["factor", "ffa", "alternate"] = Field(
        "factor", description="factor: the paper; ffa: A frozen; alternate: one factor trains, both are mixed"
    )
    period: int = Field(5, ge=1, description="alternate: rounds before the other factor's turn")
    wire: Literal["float32", "bfloat16"] = Field("float32", description="dtype of what is sent")
    members: tuple[str, ...] | None = Field(None, description="names instead of a count: who takes part (`dlora peer`)")
    silence_s: float = Field(60, gt=0, description="a neighbour from which nothing comes for so long is left out of the round")
    round_limit_s: float = Field(3600, gt=0, description="the longest a round waits for a neighbour, whatever still comes")
    catch_up_after: int = Field(10, ge=1, description="rounds behind its neighbours after which a peer takes their state")
    group_size: int | None = Field(None, ge=1, description="participants trained at once; null: as many as fit")

    @model_validator(mode="after")
    def _who(self) -> PeersSection:
        if self.members is not None and self.count is not None:
            raise ValueError("members and count are two ways to say who takes part; keep one")
        twice = sorted({name for name in self.members or () if (self.members or ()).count(name) > 1})
        if twice:
            raise ValueError(f"members names {twice[0]} twice; name each peer once")
        return self


class Config(_Section):
    """One run. `Config.load` reads it from YAML; every field has a default that works but `model`'s and `data`'s."""

    model: str = Field(description="a hub name, a folder, or pkg://package/folder inside an installed package")
    task: Literal["classification", "causal-lm"] = "classification"
    pooling: Literal["mean"] | None = Field(
        None,
        description="classification: null is the model's own head; mean: mean over tokens and one linear (sentence encoders)",
    )
    quantization: Literal["none", "int8", "nf4"] = Field("none", description="of the frozen base only; needs dlora[4bit]")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast; what trains stays float32")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection = TrainSection()
    peers: PeersSection = PeersSection()
    eval_every: int = Field(5, ge=0, description="rounds between scores of the average; 0: at the end only")
    eval_peers_every: int = Field(0, ge=0, description="rounds between scores of each peer's own; 0: at the end only")
    per_device_eval_batch_size: int = Field(64, ge=1)
    save_every: int = Field(5, ge=1, description="rounds between checkpoints; the last one is kept")
    compare: tuple[Baseline, ...] = Field((), description="baselines on the same data and seed")
    seed: int = Field(0, ge=0)
    output_dir: str = "runs/run"

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if len(set(self.compare)) != len(self.compare):
            raise ValueError("compare names a baseline twice")
        if self.task == "causal-lm" and self.pooling is not None:
            raise ValueError("pooling belongs to task classification; remove it")
        if self.task == "causal-lm" and self.data.partition.kind in ("dirichlet", "label-shares"):
            raise ValueError(
                f"partition {self.data.partition.kind} needs labels; causal-lm has none: take iid, by-column or files"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
        """Read a YAML file, apply ``key.sub=value`` overrides, fill in ``${NAME}`` from the environment.

        Raises ConfigError naming the key, what came and what was expected.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
            raise ConfigError(f"config {path} cannot be read ({reason}); give the path of a YAML file") from error
        try:
            tree = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).replace('in "<unicode string>",', "at").split())
            raise ConfigError(f"config {path} is not YAML: {reason}") from error
        if not isinstance(tree, dict):
            found = "nothing" if tree is None else f"a {type(tree).__name__}"
            raise ConfigError(f"config {path} holds {found}, expected keys such as model and data")
        for override in overrides:
            _apply_override(tree, override)
        return cls.parse(tree)

    @classmethod
    def parse(cls, tree: dict[str, Any]) -> Config:
        """Check a nested dict of keys. Raises ConfigError with one line for each mistake."""
        return parse_section(cls, _substitute(tree))

    def dump(self) -> str:
        """The resolved YAML: every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def parse_section(section: type[S], tree: dict[str, Any]) -> S:
    """Check one block on its own. Raises ConfigError with one line for each mistake."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(mistake, section, tree) for mistake in error.errors())
        raise ConfigError("\n".join(lines)) from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text (it wants 1.0e-3); people write 1e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: expected key=value, such as --set train.rounds=50")
    *parents, leaf = path.split(".")
    branch = tree
    for parent in parents:
        branch = branch.setdefault(parent, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a block of keys")
    try:
        branch[leaf] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: {value} is not YAML") from error


def _substitute(value: Any, key: str = "") -> Any:
    """Replace every ``${NAME}`` by the environment's value; an unset one is an error."""
    if isinstance(value, dict):
        return {name: _substitute(inner, f"{key}.{name}".strip(".")) for name, inner in value.items()}
    if isinstance(value, list):
        return [_substitute(inner, key) for inner in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise ConfigError(f"{key} uses ${{{name}}}, which is not set in the environment; export {name}=...")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", look_up, value)


def _explain(mistake: Any, root: type[_Section], tree: Any) -> str:
    """One pydantic mistake as one line in the user's spelling."""
    path = [str(part) for part in mistake["loc"]]
    key = ".".join(path)
    section: Any = root
    depth = 0
    while depth < len(path) - 1 and (inner := _section_of(section, path[depth])):
        section, depth = inner, depth + 1
    form = next((at for at in range(depth + 1, len(path)) if isinstance(mistake["loc"][at], str)), None)
    if form is not None:  # a key with several forms: pydantic names the form, and each of them complains
        for part in mistake["loc"][:form]:
            tree = tree[part]
        return f"{'.'.join(path[:form])}: expected {section.model_fields[path[depth]].description}; got {tree!r}"
    if mistake["type"] == "extra_forbidden":
        known = list(section.model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{key} is not a key; {hint}"
    if mistake["type"] == "missing":
        return f"{key} is missing; the config must say it"
    message = mistake["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = re.sub(r"valid dictionary or instance of \w+", "block of keys", re.sub(r"[Tt]uple", "list", message))
    if isinstance(mistake["input"], dict):
        return f"{key}: {message}".removeprefix(": ")
    return f"{key}: {message[0].lower()}{message[1:]}, got {mistake['input']!r}"


def _section_of(section: Any, key: str) -> type[_Section] | None:
    field = section.model_fields.get(key) if section else None
    candidates = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, _Section)), None)
