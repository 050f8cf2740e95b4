"""The config of a run: schedule and cloud, and the document that joins all keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dlora.config.arms import Baseline
from dlora.config.bottleneck import BottleneckSection, check_bottleneck
from dlora.config.peers import PeersSection
from dlora.config.reading import Document, Section, Text
from dlora.config.tasks import TASKS
from dlora.config.training import (
    TAKEN_OUT,
    DataSection,
    GenerationSection,
    LoraSection,
    TrainSection,
    only_biases,
)

Quantization = Literal["none", "int8", "nf4"]
DeviceMap = Text | dict[Text, int | Text]


def check_place(device: str, device_map: object) -> None:
    """Raise ValueError if a config says twice where the model is."""
    if device_map is not None and device != "auto":
        raise ValueError("device and device_map are two ways to say where the model is; keep one")


class SplitSection(Section):
    """The cloud that runs the frozen model. Data, labels, factors and head stay on the device."""

    cloud: Text = Field(
        min_length=1,
        description="the member that runs the frozen model, by its name in the federation",
    )
    wire: Literal["float32", "bfloat16", "int8"] = Field(
        "bfloat16",
        description=(
            "dtype of sent hidden states, updates and gradients; int8: each token has its own scale"
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
    """Which units train now. A unit is the modules that read the same input, for example
    query, key and value.

    A key that a kind does not use has no effect, so that one file serves all kinds: `--set
    schedule.kind=all`. Only `units` is refused.
    """

    kind: Literal["all", "static", "random", "probe", "kr"] = Field(
        "all",
        description=(
            "which units train; all: every unit; kr: Kill and Revive; static: those in `units`;"
            " random: drawn anew each `period`; probe: chosen once, after `warmup_steps`"
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
            "kr: local steps of the first rotation, which tries every unit; probe: local steps with"
            " all units active"
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
    """One run. `Config.load` reads it from YAML. Only `model` and `data` must be given."""

    model: Text = Field(
        description="a hub name, a folder, or pkg://package/folder inside an installed package"
    )
    task: Literal[
        "classification", "regression", "multi-label", "token-classification", "causal-lm"
    ] = Field(
        "classification",
        description=(
            "what a text gets; classification: one label; regression: a number; multi-label: any"
            " number of labels; token-classification: a label for each word; causal-lm: a text that"
            " the model writes"
        ),
    )
    pooling: Literal["mean"] | None = Field(
        None,
        description=(
            "one label, number or labels for a text; null: the model's own head; mean: one linear"
            " on the mean over tokens (for sentence encoders)"
        ),
    )
    quantization: Quantization = Field(
        "none", description="of the frozen weights only; needs dlora[4bit]"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: autocast; factors and head stay float32"
    )
    device: Text = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    device_map: DeviceMap | None = Field(
        None,
        description=(
            "null, or a word or {module: device} as in transformers: one process has the model on"
            " several GPUs"
        ),
    )
    shard_model: bool = Field(
        False,
        description=(
            "true: each process under torchrun holds a part of the frozen model (FSDP2), for a"
            " model that is too large for one device; it works with quantization nf4"
        ),
    )
    lora: LoraSection = LoraSection()
    peft: dict[Text, Any] | None = Field(
        None,
        description=(
            "instead of lora: another adapter by PEFT's own words, such as {peft_type: IA3}, or"
            " {bias: all}, the frozen model's biases; peers then train one at a time"
        ),
    )
    bottleneck: BottleneckSection | None = Field(None, description="instead of lora; null: lora")
    data: DataSection
    train: TrainSection = TrainSection()
    peers: PeersSection = PeersSection()
    schedule: ScheduleSection = ScheduleSection()
    split: SplitSection | None = Field(
        None, description="the cloud that runs the frozen model; null: it runs here"
    )
    generation: GenerationSection | None = Field(
        None, description="scores of texts that the model writes; null: none are written"
    )
    eval_every: int = Field(
        5, ge=0, description="rounds between scores of the average adapter; 0: only at the end"
    )
    eval_peers_every: int = Field(
        0, ge=0, description="rounds between scores of each peer's own adapter; 0: only at the end"
    )
    eval_peers: Literal["all", "none"] | Annotated[int, Field(ge=1)] = Field(
        "all",
        description=(
            "peers whose own adapters are scored: all, none, or a number of peers, drawn by the"
            " seed (then the mean has a standard error)"
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
        0,
        ge=0,
        lt=2**63,
        description="seed of initial factors, order of rows, dropout and partition",
    )
    output_dir: Text = Field(
        "runs/run", description="the folder of the run; it must not hold another run"
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
        if self.bottleneck is not None:
            check_bottleneck(self.lora, self.peers.rule)
        task = TASKS[self.task]
        if task.label == "words" and not isinstance(self.data.text, str):
            raise ValueError(
                "token-classification reads words from one column; data.text names two"
            )
        if self.pooling is not None and not task.can_pool:
            fitting = " or ".join(name for name, task in TASKS.items() if task.can_pool)
            raise ValueError(f"pooling belongs to task {fitting}; remove it")
        if self.data.partition.kind in ("dirichlet", "label-shares") and task.label != "class":
            raise ValueError(
                f"partition {self.data.partition.kind} needs one label a row; {self.task} has"
                " none: take iid, by-column or files"
            )
        if self.generation is not None:
            self._check_generation(self.generation)
        if self.lora.placement == "core" and self.peers.rule != "factor":
            raise ValueError(
                f"peers.rule {self.peers.rule} chooses between A and B, which placement core"
                " freezes both: averaging the cores is exact as it is; take rule factor"
            )
        check_place(self.device, self.device_map)
        if self.shard_model and self.device_map is not None:
            raise ValueError(
                "shard_model and device_map are two ways to divide the model: several processes or"
                " one; keep one"
            )
        if self.shard_model and self.quantization == "int8":
            raise ValueError(
                "shard_model: weights of int8 cannot be divided; take quantization nf4 or none"
            )
        if self.peft is not None or self.lora.modules_to_save is not None:
            self._check_swapped()
        if self.lora.init_lora_weights in TAKEN_OUT and self.quantization != "none":
            raise ValueError(
                f"lora.init_lora_weights {self.lora.init_lora_weights} changes the frozen weights,"
                " and quantised ones cannot be changed: remove quantization, or take true"
            )
        if self.split is not None:
            self._check_split()
        return self

    def _check_swapped(self) -> None:
        """What adapters of `lora.swapped` do not go with."""
        if self.peft is not None:
            kind = str(self.peft.get("peft_type", ""))
            if not only_biases(self.peft) and (not kind or kind.upper() == "LORA"):
                raise ValueError(
                    "peft names another adapter than LoRA, such as {peft_type: IA3}, or the biases"
                    " {bias: all}; for LoRA use lora"
                )
            if (
                self.bottleneck
                or self.lora.model_copy(update={"train_head": True}) != LoraSection()
            ):
                other = "bottleneck" if self.bottleneck else "lora"
                raise ValueError(f"peft and {other} are two kinds of adapter; keep one block")
        what = "lora.modules_to_save" if self.peft is None else "peft"
        for key, value, wanted in (
            ("schedule.kind", self.schedule.kind, "all"),
            ("split", self.split and self.split.cloud, None),
            ("shard_model", self.shard_model, False),
            ("device_map", self.device_map, None),
            ("peers.rule", self.peers.rule, "factor"),
        ):
            if value != wanted:
                raise ValueError(
                    f"{key} {value} is for the pairs A and B of LoRA alone, and the config has"
                    f" {what}: remove one of them"
                )

    @property
    def adapter_section(self) -> LoraSection | BottleneckSection:
        """The block of the kind of adapter that trains."""
        return self.lora if self.bottleneck is None else self.bottleneck

    def _check_generation(self, section: GenerationSection) -> None:
        if missing := set(section.scores) - set(TASKS[self.task].scores):
            raise ValueError(
                f"generation: task {self.task} has no score {min(missing)}, because its model"
                " writes no texts; remove generation"
            )
        for key, used in (
            ("split", self.split),
            ("shard_model", self.shard_model),
            ("peft", self.peft),
            ("lora.modules_to_save", self.lora.modules_to_save),
        ):
            if used:
                raise ValueError(
                    f"generation does not go with {key} yet: remove generation, and score the"
                    " texts with PEFT and transformers where the whole model is"
                )

    def _hands_off(self) -> bool:
        return self.schedule.kind != "all" and self.schedule.on_kill == "hand-off"

    def _check_split(self) -> None:
        if self.lora.bias != "none":
            raise ValueError(
                f"split: the biases of the frozen model are in the cloud, and lora.bias"
                f" {self.lora.bias} trains them: remove one of them"
            )
        for key in ("shard_model", "device_map"):
            if getattr(self, key):
                raise ValueError(f"split: the frozen model is in the cloud: remove {key}")
        if self.lora.use_dora:
            raise ValueError(
                "split: lora.use_dora divides by the lengths of the rows of W + BA, and W is in the"
                " cloud only: remove use_dora"
            )
        if self.lora.init_lora_weights in TAKEN_OUT:
            raise ValueError(
                f"split: lora.init_lora_weights {self.lora.init_lora_weights} takes A and B out of"
                " the weights, which are in the cloud only: take true, or lora.placement core,"
                " whose A and B are the weights' own directions too"
            )
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
