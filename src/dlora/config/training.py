"""The config blocks lora, data and train: what one participant trains, and on which rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dlora.config.names import why_unsafe
from dlora.config.reading import Section, Text

_NOT_YET = {  # PEFT's keys that dlora does not have -> the reason, and what to do instead
    "init": "it is called init_lora_weights",
    "target_parameters": "dlora adapts linears only; name them in target_modules",
    "layers_pattern": "the first number in a name is its layer; leave it out",
    "task_type": "dlora takes it from task; leave it out",
}


_DRAWN = ("gaussian", "pissa", "olora")
# the inits that take A and B out of the frozen weights
TAKEN_OUT = ("pissa", "olora")


def only_biases(peft: Mapping[str, Any]) -> bool:
    """Whether a config block peft asks for trained biases and no adapter (BitFit)."""
    return dict(peft) == {"bias": "all"}


class LoraSection(Section):
    """The shape of the adapter; names and meaning are PEFT's."""

    r: int = Field(8, ge=1, description="rank of every pair (A, B)")
    lora_alpha: float = Field(16, gt=0, description="scaling = lora_alpha / r")
    lora_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "`simulate` draws one mask for all peers; with peers.group_size 1 it draws one for each"
            " peer, as real peers do"
        ),
    )
    target_modules: Literal["all-linear"] | tuple[Text, ...] | Text = Field(
        "all-linear",
        description=(
            "all-linear: the linears of the transformer blocks; else names or one regex, as in PEFT"
        ),
    )
    exclude_modules: tuple[Text, ...] | Text | None = Field(
        None,
        description="names or one regex of linears that are not adapted, as in PEFT; null: none",
    )
    layers_to_transform: int | tuple[int, ...] | None = Field(
        None,
        description=(
            "numbers of the blocks whose linears are adapted, from 0, as in PEFT; null: all"
        ),
    )
    rank_pattern: dict[Text, Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description=(
            "{name: r} for linears whose rank differs, by names or regexes, as in PEFT; null: none"
        ),
    )
    alpha_pattern: dict[Text, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="{name: lora_alpha} for linears whose alpha differs; null: none"
    )
    use_rslora: bool = Field(
        False, description="true: scaling = lora_alpha / sqrt(r), for large ranks (rsLoRA)"
    )
    use_dora: bool = Field(
        False,
        description="true: the length of each row of the weight trains too, and is mixed (DoRA)",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none",
        description=(
            "all: the biases of the frozen model train too; lora_only: those of the adapted linears"
        ),
    )
    modules_to_save: tuple[Text, ...] | None = Field(
        None,
        description=(
            "names of modules that train as a whole and are sent, such as embed_tokens, as in PEFT;"
            " peers then train one at a time; null: none beside the head"
        ),
    )
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora"] = Field(
        True,
        description=(
            "true: A is drawn as torch draws a linear, B is zero; gaussian: A with a standard"
            " deviation of 1/r; pissa, olora: A and B are taken out of the weight"
        ),
    )
    adapter: Text | None = Field(
        None,
        min_length=1,
        description=(
            "a folder with an adapter of PEFT, from which all begin, such as RUN/consensus; null:"
            " they begin with the frozen model"
        ),
    )
    train_head: bool = Field(
        True, description="classification: train, mix and send the new head too"
    )
    placement: Literal["literal", "core"] = Field(
        "literal",
        description=(
            "literal: A and B train; core: A and B are frozen at the top singular directions of the"
            " weight, and an r x r core between them trains"
        ),
    )
    frame: Text | None = Field(
        None,
        min_length=1,
        description=(
            "core: the file of the directions; it is written if it does not exist; null: they are"
            " computed from the model"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _not_yet(cls, tree: Any) -> Any:
        for key in tree if isinstance(tree, dict) else ():
            if key in _NOT_YET:
                raise ValueError(f"{key}: {_NOT_YET[key]}")
        drawn = tree.get("init_lora_weights") if isinstance(tree, dict) else None
        if drawn is False or (isinstance(drawn, str) and drawn not in _DRAWN):
            raise ValueError(
                f"init_lora_weights {str(drawn).lower()}: dlora knows true, {', '.join(_DRAWN)},"
                " with which all start at the frozen model; take one of them"
            )
        return tree

    @model_validator(mode="after")
    def _frame_of_a_core(self) -> LoraSection:
        if self.frame is not None and self.placement != "core":
            raise ValueError("frame belongs to placement core; remove it")
        return self

    @model_validator(mode="after")
    def _what_goes_together(self) -> LoraSection:
        if self.placement == "core":
            for key, as_it_is in (
                ("rank_pattern", None),
                ("init_lora_weights", True),
                ("use_dora", False),
                ("bias", "none"),
                ("modules_to_save", None),
                ("adapter", None),
            ):
                if getattr(self, key) != as_it_is:
                    raise ValueError(
                        f"{key} belongs to placement literal: under core A and B are the weight's"
                        " own directions, all of one rank, and only a core trains; remove it"
                    )
        if self.adapter is not None and self.init_lora_weights in TAKEN_OUT:
            raise ValueError(
                f"adapter gives A and B, and init_lora_weights {self.init_lora_weights} too; remove"
                " one of them"
            )
        if self.bias != "none" and self.use_dora:
            raise ValueError(
                "bias: DoRA scales what a linear gives without its bias, so both cannot train;"
                " remove bias or use_dora"
            )
        if self.modules_to_save is not None and self.init_lora_weights in TAKEN_OUT:
            raise ValueError(
                f"modules_to_save does not go with init_lora_weights {self.init_lora_weights},"
                " which changes the frozen weights; remove one of them"
            )
        if self.layers_to_transform is not None and (
            isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        ):
            raise ValueError(
                "layers_to_transform goes with names in target_modules; write the layers into its"
                " regex"
            )
        return self


class PartitionSection(Section):
    """How the training rows are divided between the peers."""

    kind: Literal["iid", "dirichlet", "label-shares", "by-column", "files"] = Field(
        "iid",
        description=(
            "how rows are divided; files: each peer has its own file, and data.train is"
            " {peer: file}"
        ),
    )
    concentration: float | None = Field(
        None, gt=0, description="dirichlet: a small value (0.1) is skewed, a large value is iid"
    )
    min_rows: int = Field(
        1, ge=1, description="dirichlet: rows are drawn again until every peer has at least so many"
    )
    shares: tuple[tuple[float, ...], ...] | None = Field(
        None,
        description=(
            "label-shares: one row for each peer, one column for each label: the shares of the"
            " labels in that peer's data"
        ),
    )
    column: Text | None = Field(
        None, description="by-column: the column whose values say to which peer a row belongs"
    )
    sizes: tuple[float, ...] | None = Field(
        None, description="iid, label-shares: relative number of rows for each peer"
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
    """The training and evaluation data, their columns, and how rows are divided."""

    train: Text | dict[Text, Text] = Field(
        description="jsonl, json, csv, tsv, parquet (also .gz), a hub name, or {peer: file}"
    )
    eval: Text | dict[Text, Text] = Field(
        description="the rows on which every score is measured; the same forms as train"
    )
    columns: tuple[Text, ...] | None = Field(
        None, description="names of the columns of a csv or tsv without a header"
    )
    text: Text | tuple[Text, Text] = Field(
        "text", description="the column of the text, or two for pairs; causal-lm has its own"
    )
    label: Text = Field("label", description="the column of the label; causal-lm has none")
    labels: tuple[Text, ...] | None = Field(
        None, description="the labels in order; null: the labels of the training data, sorted"
    )
    no_label: tuple[Text, ...] | None = Field(
        None,
        description=(
            "classification and regression: labels that mean none, such as ['-1', '-']; rows with"
            " one of them, or with no value, are left out; null: every row needs a label"
        ),
    )
    fold_system: bool = Field(
        False,
        description=(
            "chats: write the system's turn into the user's first turn, for templates without the"
            " role system"
        ),
    )
    max_length: int = Field(
        128,
        ge=2,
        description="tokens; longer examples are cut, and a longer plain text becomes several",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="training rows, that is whole texts, drawn by the seed; null: all",
    )
    eval_limit: int | None = Field(
        None, ge=1, description="evaluation rows, counted as those of limit; null: all"
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


class GenerationSection(Section):
    """Scores of texts: the model writes one after the prompt of each row of `data.eval`, always the
    likeliest token, and it is compared with the row's answer.
    """

    scores: tuple[Literal["exact_match", "rouge_l"], ...] = Field(
        ("exact_match",),
        min_length=1,
        description=(
            "exact_match: the last number is that of the answer (GSM8K), or the text is the answer"
            " where that has no number; rouge_l: the F-measure of the longest common subsequence"
        ),
    )
    max_new_tokens: int = Field(256, ge=1, description="the most tokens of a text")


class TrainSection(Section):
    """Local training between two exchanges. Keys have the names of transformers'
    TrainingArguments.
    """

    rounds: int = Field(20, ge=1, description="exchanges with the neighbours")
    local_steps: int | None = Field(
        None, ge=1, description="optimiser steps of each peer between two exchanges (default 5)"
    )
    local_epochs: float | None = Field(
        None, gt=0, description="instead of local_steps: passes over the peer's own rows"
    )
    per_device_train_batch_size: int = Field(
        8, ge=1, description="examples of each peer in one micro-batch"
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="micro-batches in one optimiser step"
    )
    learning_rate: float = Field(1e-3, gt=0, description="the highest learning rate of the run")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw, or sgd without momentum"
    )
    optimizer_state: Literal["keep", "reset"] = Field(
        "keep", description="AdamW's moments after a mix: kept, or set to zero"
    )
    weight_decay: float = Field(0.0, ge=0, description="applies to everything that trains")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="for each participant's gradient; null: no clipping"
    )
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
        False, description="compute activations again in the backward pass, to save memory"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> TrainSection:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("local_steps and local_epochs are two ways to say one thing; keep one")
        if self.local_steps is None and self.local_epochs is None:
            object.__setattr__(self, "local_steps", 5)
        return self
