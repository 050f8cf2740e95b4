"""Laws 1, 2, 5 and 10 for adapters that are not LoRA: they are swapped through one model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.errors import ConfigError, Interrupted, ModelError
from dlora.events.log import read_log
from dlora.run.prepare import Prepared, prepare
from kit.page_blocks import blocks
from kit.plain_loop import plain_loop
from kit.run_folders import assert_identical, factors_of, optimizer_of, stop_after
from kit.updates import LOSS_BOUND, UPDATE_BOUND, peft_oracle, plain_model

pytestmark = [
    pytest.mark.usefixtures("no_page"),
    pytest.mark.filterwarnings("ignore:peers train one at a time"),
]

MakeConfig = Callable[..., Config]
# as docs/runs.md writes it
IA3 = next(yaml.safe_load(one.text)["peft"] for one in blocks("docs/runs.md") if "IA3" in one.text)
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ia3": ("bert", "classification", IA3),
    "loha": ("bert", "classification", {"peft_type": "LOHA", "target_modules": ["query"], "r": 2}),
    "prompt": ("llama", "causal-lm", {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}),
    "prefix": ("llama", "causal-lm", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}),
}


def swapped(make_config: MakeConfig, kind: str, **more: Any) -> Config:
    family, task, section = KINDS[kind]
    keys = {"lora": {}, "peft": section, "train.learning_rate": 1e-2, "eval_every": 0}
    return make_config(family, task, **keys | more)


def trained_by_peft(config: Config, prepared: Prepared, peer: int) -> tuple[Any, list[float]]:
    """What PEFT alone makes of one peer's rows."""
    model, _ = peft_oracle(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    causal = config.task == "causal-lm"
    return model, plain_loop(config, prepared, [peer], model, trained, skip_first=causal)


@torch.no_grad()
def loss_on_evaluation(prepared: Prepared, model: Any) -> float:
    """The mean loss of the evaluation rows, one row at a time."""
    total, targets = 0.0, 0
    for row in prepared.data.evaluation:
        batch = collate([row], prepared.pad_token_id)
        if batch.labels.dim() == 2:  # the first token is no target, also after virtual tokens
            batch.labels[:, 0] = -100
        found = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        )
        count = 1 if batch.labels.dim() == 1 else int((batch.labels[:, 1:] != -100).sum())
        total, targets = total + found.loss.item() * count, targets + count
    return total / targets


@pytest.mark.parametrize(
    "kind",
    [
        "ia3",
        "prompt",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("loha", "prefix")),
    ],
)
def test_each_peer_is_what_peft_makes_of_its_rows(make_config: MakeConfig, kind: str) -> None:
    """Laws 1 and 2 without an exchange, and the folder loads in PEFT and gives the printed loss."""
    config = swapped(
        make_config,
        kind,
        **{
            "train.rounds": 20,
            "train.local_steps": 1,
            "train.lr_scheduler_type": "constant",
            "peers.count": 2,
            "peers.topology": {"kind": "edges", "edges": [[0, 1]]},
            "compare": ["local"],
        },
    )
    dlora.simulate(config)
    prepared = prepare(config)
    ours = [
        event["losses"]
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "round" and event["run"] == "local"
    ]
    for peer in range(2):
        model, losses = trained_by_peft(config, prepared, peer)
        found = [both[peer] for both in ours]
        assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) < LOSS_BOUND
        own = {name: one for name, one in model.named_parameters() if one.requires_grad}
        start = prepared.model.initial
        assert own.keys() == start.keys()
        ended = factors_of(config, "local")
        moved = torch.cat([(ended[name][peer] - start[name]).flatten() for name in own])
        wanted = torch.cat([(own[name].detach() - start[name]).flatten() for name in own])
        assert (moved - wanted).norm() / wanted.norm() < UPDATE_BOUND["adamw"]


@pytest.mark.parametrize("kind", ["ia3", pytest.param("prompt", marks=pytest.mark.slow)])
def test_the_folder_loads_in_peft_and_is_scored_again(make_config: MakeConfig, kind: str) -> None:
    config = swapped(make_config, kind, **{"train.rounds": 2})
    summary = dlora.simulate(config)
    printed = summary["runs"]["dec-lora"]["consensus"]["loss"]
    assert dlora.score(config.output_dir)["consensus"]["loss"] == pytest.approx(printed, abs=1e-5)
    base, _ = dlora.load_base(config.output_dir)
    model = peft.PeftModel.from_pretrained(base, Path(config.output_dir, "consensus")).eval()
    assert loss_on_evaluation(prepare(config), model) == pytest.approx(printed, abs=1e-4)


def test_a_resumed_run_ends_with_the_same_bits(make_config: MakeConfig, tmp_path: Path) -> None:
    """Law 10."""
    ends = []
    for name in ("one", "two"):
        config = swapped(make_config, "ia3", output_dir=str(tmp_path / name))
        if name == "two":
            with pytest.raises(Interrupted):
                dlora.simulate(config, stop=stop_after(2))
        dlora.simulate(config, resume=name == "two")
        ends.append((factors_of(config), optimizer_of(config)))
    for one, two in zip(*ends, strict=True):
        assert_identical(one, two)
    assert load_file(tmp_path / "two" / "consensus" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"peft": {"peft_type": "LORA"}}, "for LoRA use lora"),
        ({"peft": {}}, "peft names another adapter"),
        ({"lora": {"r": 2}}, "peft and lora are two kinds of adapter"),
        ({"bottleneck": {"r": 2}}, "peft and bottleneck are two kinds of adapter"),
        ({"schedule": {"kind": "kr"}}, "schedule.kind kr is for the pairs A and B .* has peft"),
        ({"peers.rule": "ffa"}, "peers.rule ffa is for the pairs A and B"),
        ({"split": {"cloud": "hub"}}, "split hub is for the pairs A and B"),
    ],
)
def test_what_does_not_go_with_it(make_config: MakeConfig, more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_config(**{"lora": {}, "peft": IA3} | more)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"peft_type": "IA33"}, "IA33 is no peft_type .*; did you mean IA3.*BOFT"),
        ({"peft_type": "IA3", "target_module": ["value"]}, "no key of IA3; did you mean target_m"),
        ({"peft_type": "IA3", "target_modules": 3}, "PEFT cannot make this adapter"),
        ({"peft_type": "LOHA", "target_modules": ["quary"]}, "No modules were targeted"),
    ],
)
def test_what_peft_refuses_is_told_in_a_line(
    make_config: MakeConfig, section: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=f"^peft: .*{says}"):
        prepare(make_config(lora={}, peft=section))


def test_biases_alone_are_what_a_plain_loop_makes_of_them(make_config: MakeConfig) -> None:
    """Law 1 for BitFit (arXiv 2106.10199), without PEFT; the folder loads in PEFT."""
    config = make_config(
        lora={}, peft={"bias": "all"}, eval_every=0, **{
            "peers.count": 1, "train.rounds": 20, "train.local_steps": 1,
            "train.learning_rate": 1e-2, "train.lr_scheduler_type": "constant",
        },
    )  # fmt: skip
    summary = dlora.simulate(config)
    prepared = prepare(config)
    model = plain_model(config)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "bias" in name or name.startswith("classifier.")
        trained += [parameter] if parameter.requires_grad else []
    losses = plain_loop(config, prepared, [0], model, trained)
    ours = [
        event["loss"]
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "round"
    ]
    assert losses[-1] < losses[0] - 0.01
    assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) < LOSS_BOUND
    assert len(prepared.model.initial) == len(trained)
    base, _ = dlora.load_base(config.output_dir)
    loaded = peft.PeftModel.from_pretrained(base, Path(config.output_dir, "consensus")).eval()
    assert loss_on_evaluation(prepared, loaded) == pytest.approx(
        summary["runs"]["dec-lora"]["consensus"]["loss"], abs=1e-5
    )


def test_virtual_tokens_do_not_go_with_a_mean(make_config: MakeConfig) -> None:
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    with pytest.raises(ModelError, match="PROMPT_TUNING puts virtual tokens .* remove pooling"):
        prepare(make_config(lora={}, peft=prompt, pooling="mean"))


def test_a_module_that_holds_others_of_its_ending(make_config: MakeConfig) -> None:
    """BERT's embeddings hold word_embeddings, whose name ends alike, and PEFT looks at ends."""
    config = make_config(**{"lora.modules_to_save": ["embeddings"], "train.rounds": 2})
    printed = dlora.simulate(config)["runs"]["dec-lora"]["consensus"]["loss"]
    assert dlora.score(config.output_dir)["consensus"]["loss"] == pytest.approx(printed, abs=1e-5)
    base, _ = dlora.load_base(config.output_dir)
    loaded = peft.PeftModel.from_pretrained(base, Path(config.output_dir, "consensus")).eval()
    prepared = prepare(config)
    assert loss_on_evaluation(prepared, loaded) == pytest.approx(printed, abs=1e-5)
    saved = [one for name, one in prepared.model.initial.items() if "embeddings" in name]
    whole = prepared.model.network.model.get_submodule("base_model.model.bert.embeddings")
    own = whole.modules_to_save["default"].parameters()
    assert sum(one.numel() for one in saved) == sum(one.numel() for one in own)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["embed_tokens"],
            "embed_tokens matches no module; those with weights are .*word_embeddings",
        ),
        (["layer.0"], "layer.0 holds .*query, which trains by itself"),
        (["embeddings", "word_embeddings"], "embeddings holds .*word_embeddings"),
    ],
)
def test_modules_that_cannot_be_saved(make_config: MakeConfig, names: list[str], says: str) -> None:
    with pytest.raises(ModelError, match=f"^lora.modules_to_save: .*{says}"):
        prepare(make_config(**{"lora.modules_to_save": names}))
