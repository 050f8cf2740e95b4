"""`simulate` from config to run folder: what it leaves behind, resuming bit for bit, groups, what
adapters score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.events.log import read_log
from dlora.programs import simulate as program
from dlora.run.grouping import find_grouping
from dlora.run.prepare import prepare
from kit.bottlenecks import BOTTLENECK
from kit.run_folders import assert_identical, factors_of, optimizer_of, stop_after, story
from kit.updates import KINDS

pytestmark = [
    pytest.mark.usefixtures("no_page"),
    pytest.mark.filterwarnings("ignore:peers train one at a time"),
]

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_the_adapters_load_with_peft_and_give_the_printed_score(
    make_config: MakeConfig, pooling: str | None
) -> None:
    # its own head has two layers
    config = make_config("roberta", **{"train.rounds": 6, "pooling": pooling})
    summary = dlora.simulate(config)
    scored = dlora.score(config.output_dir)
    prepared = prepare(config)
    batch = collate(prepared.data.evaluation, prepared.pad_token_id)
    result = summary["runs"]["dec-lora"]
    assert scored.keys() == {"consensus", *result["peers"]}
    folders = {
        "consensus": result["consensus"],
        **{f"peers/{peer}": own for peer, own in result["peers"].items()},
    }
    for folder, expected in folders.items():
        base, _ = dlora.load_base(config.output_dir)
        if pooling is None:  # the model's own head needs nothing of dlora's
            base = transformers.AutoModelForSequenceClassification.from_pretrained(
                config.model, num_labels=2
            )
        model = peft.PeftModel.from_pretrained(base, Path(config.output_dir, folder)).eval()
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        assert (logits.argmax(-1) == batch.labels).double().mean().item() == expected["accuracy"]
        loss = torch.nn.functional.cross_entropy(logits, batch.labels).item()
        assert loss == pytest.approx(expected["loss"], abs=1e-5)
        assert scored[folder.removeprefix("peers/")] == pytest.approx(expected, abs=1e-6)


# of sgd-dropout, which says that real peers draw other masks
@pytest.mark.filterwarnings("ignore:dropout. the")
@pytest.mark.parametrize(
    "overrides",
    [
        {"train.optimizer": "adamw", "peers.topology": {"kind": "base-k"}, "peers.count": 5},
        pytest.param(
            {"train.optimizer": "sgd", "train.model_dropout": None, "lora.lora_dropout": 0.1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "peers.rule": "alternate",
                "peers.period": 2,
                "peers.wire": "bfloat16",
                "train.lr_scheduler_type": "linear",
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "train.local_steps": None,
                "train.local_epochs": 1,
                "data.partition": {"kind": "dirichlet", "concentration": 0.5},
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "peers.group_size": 3,
                "train.gradient_accumulation_steps": 2,
                "train.optimizer_state": "reset",
            },
            marks=pytest.mark.slow,
        ),
        *(
            pytest.param(KINDS[kind], marks=pytest.mark.slow)
            for kind in ("rslora", "patterns", "dora", "pissa", "biases", "whole-modules", "ia3")
        ),
        pytest.param(BOTTLENECK, marks=pytest.mark.slow),
    ],
    ids=[
        *("adamw-base-k", "sgd-dropout", "alternate-bfloat16", "local-epochs-dirichlet", "groups"),
        *("rslora", "patterns", "dora", "pissa", "biases", "whole-modules", "ia3", "bottleneck"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    """Law 10. Interrupted twice, in Dec-LoRA and in a baseline: factors, moments, log and summary
    are those of one go.
    """
    overrides = {
        "train.rounds": 7,
        "save_every": 2,
        "eval_every": 2,
        "compare": ["local", "pooled"],
        **overrides,
    }
    whole = make_config(**overrides, output_dir=str(tmp_path / "whole"))
    summary = dlora.simulate(whole)
    parts = make_config(**overrides, output_dir=str(tmp_path / "parts"))
    with pytest.raises(dlora.Interrupted, match="dec-lora stopped after round 3 of 7"):
        program.simulate(parts, stop=stop_after(3))
    with pytest.raises(dlora.Interrupted, match="local stopped after round 1 of 7"):
        program.simulate(parts, resume=True, stop=stop_after(4 + 1))
    resumed = program.simulate(parts, resume=True)
    for run in ("dec-lora", "local", "pooled"):
        assert_identical(factors_of(whole, run), factors_of(parts, run))
        assert_identical(optimizer_of(whole, run), optimizer_of(parts, run))
        for key in (
            "consensus",
            "peers",
            "peers_mean",
            "best",
            "bytes_on_wire",
            "consensus_distance",
        ):
            assert resumed["runs"][run][key] == summary["runs"][run][key]
    assert story(whole) == story(parts)


def test_a_crash_between_checkpoints_costs_the_rounds_since_the_last(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    whole = make_config(
        **{"train.rounds": 5, "save_every": 2, "eval_every": 1}, output_dir=str(tmp_path / "whole")
    )
    dlora.simulate(whole)
    crashed = make_config(
        **{"train.rounds": 5, "save_every": 2, "eval_every": 1},
        output_dir=str(tmp_path / "crashed"),
    )

    def crash(event: Mapping[str, Any]) -> None:
        if event["event"] == "scores" and event["rounds_done"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dlora.simulate(crashed, listeners=[crash])
    dlora.simulate(crashed, resume=True)
    assert_identical(factors_of(whole), factors_of(crashed))
    assert story(whole) == story(crashed)  # the log forgot what was run twice


def test_more_rounds_go_on_bit_for_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    long = make_config(
        **{"train.rounds": 6, "compare": ["pooled"]}, output_dir=str(tmp_path / "long")
    )
    dlora.simulate(long)
    short = make_config(
        **{"train.rounds": 4, "compare": ["pooled"]}, output_dir=str(tmp_path / "short")
    )
    dlora.simulate(short)
    longer = make_config(
        **{"train.rounds": 6, "compare": ["pooled"]}, output_dir=str(tmp_path / "short")
    )
    summary = dlora.simulate(longer, resume=True)
    for run in ("dec-lora", "pooled"):
        assert_identical(factors_of(long, run), factors_of(longer, run))
    assert summary["runs"]["dec-lora"]["bytes_on_wire"] == 6 * 8 * summary["message_bytes"]


def test_groups_train_what_the_whole_stack_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    whole = make_config(
        **{"compare": ["pooled"], "train.optimizer": "sgd"}, output_dir=str(tmp_path / "whole")
    )
    dlora.simulate(whole)
    keys = {"compare": ["pooled"], "train.optimizer": "sgd", "peers.group_size": 3}
    grouped = make_config(**keys, output_dir=str(tmp_path / "groups"))
    summary = dlora.simulate(grouped)
    assert summary["group_size"] == 3
    for run in ("dec-lora", "pooled"):
        for name, tensor in factors_of(whole, run).items():
            torch.testing.assert_close(factors_of(grouped, run)[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_group_shrinks_when_memory_is_short(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(make_config())
    assert find_grouping(prepared).size == 4
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: type("Memory", (), {"available": 2_000_000})()
    )
    shrunk = find_grouping(prepared).size
    assert 1 <= shrunk < 4


def test_dropout_says_what_it_costs(make_config: MakeConfig) -> None:
    """Field case 43: with any dropout real peers draw other masks; said where several train at
    once, not with group_size 1.
    """
    for keys in ({"train.model_dropout": None}, {"lora.lora_dropout": 0.1}):
        with pytest.warns(
            UserWarning,
            match=r"dropout: the 4 peers that train at once .*peers.group_size: 1 makes them equal",
        ):
            assert find_grouping(prepare(make_config(**keys))).size == 4
        assert find_grouping(prepare(make_config(**keys, **{"peers.group_size": 1}))).size == 1
    find_grouping(prepare(make_config()))


def test_accumulated_gradients_are_those_of_the_larger_batch(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    large = make_config(
        "llama", "causal-lm", **{"train.optimizer": "sgd"}, output_dir=str(tmp_path / "large")
    )
    dlora.simulate(large)
    keys = {
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.optimizer": "sgd",
    }
    small = make_config("llama", "causal-lm", **keys, output_dir=str(tmp_path / "small"))
    dlora.simulate(small)
    for name, tensor in factors_of(large).items():
        torch.testing.assert_close(factors_of(small)[name], tensor, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    plain = make_config(output_dir=str(tmp_path / "plain"))
    dlora.simulate(plain)
    spared = make_config(
        **{"train.gradient_checkpointing": True}, output_dir=str(tmp_path / "spared")
    )
    dlora.simulate(spared)
    for name, tensor in factors_of(plain).items():
        torch.testing.assert_close(factors_of(spared)[name], tensor, rtol=1e-5, atol=1e-7)


def test_a_resting_head_stays_is_not_sent_and_is_saved(make_config: MakeConfig) -> None:
    config = make_config(**{"lora.train_head": False})
    initial = prepare(config).model.initial
    summary = dlora.simulate(config)
    saved = load_file(Path(config.output_dir, "consensus/adapter_model.safetensors"))
    assert torch.equal(saved["base_model.model.classifier.weight"], initial["classifier.weight"])
    trained = sum(tensor.numel() for name, tensor in initial.items() if "lora_" in name)
    assert summary["trainable_parameters"] == trained
    assert summary["message_bytes"] < 4 * trained + 8000


def test_ffa_leaves_A_alone_and_sends_half(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**{"peers.rule": "ffa"})
    initial = prepare(config).model.initial
    summary = dlora.simulate(config)
    for name, tensor in factors_of(config).items():
        assert torch.equal(tensor, initial[name].expand_as(tensor)) == name.endswith("lora_A"), name
    full = dlora.simulate(make_config(output_dir=str(tmp_path / "factor")))
    assert (
        summary["runs"]["dec-lora"]["bytes_on_wire"]
        < 0.7 * full["runs"]["dec-lora"]["bytes_on_wire"]
    )


@pytest.mark.parametrize(
    ("family", "quantization"),
    [("llama", "nf4"), ("bert", "int8"), pytest.param("bert", "nf4", marks=pytest.mark.slow)],
)
def test_a_quantised_base_trains_and_the_loss_falls(
    make_config: MakeConfig, family: str, quantization: str
) -> None:
    pytest.importorskip("bitsandbytes")
    config = make_config(family, **{"quantization": quantization, "train.rounds": 15})
    dlora.simulate(config)
    losses = [
        event["loss"]
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "round"
    ]
    assert losses[-1] < losses[0] - 0.05


def test_bfloat16_is_autocast_and_what_trains_stays_float32(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("llama", **{"dtype": "bfloat16", "train.rounds": 15})
    dlora.simulate(config)
    assert {tensor.dtype for tensor in factors_of(config).values()} == {torch.float32}
    losses = [
        event["loss"]
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "round"
    ]
    assert losses[-1] < losses[0] - 0.05
    exact = make_config("llama", **{"train.rounds": 15}, output_dir=str(tmp_path / "exact"))
    dlora.simulate(exact)
    name = "model.layers.0.mlp.down_proj.lora_B"
    assert not torch.equal(factors_of(exact)[name], factors_of(config)[name])


def test_language_models_are_scored_by_perplexity_and_by_choice(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "the film was", "options": ["good", "bad"], "answer": index % 2}
        for index in range(6)
    ]
    (tmp_path / "choices.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = make_config("llama", "causal-lm", **{"data.eval": str(tmp_path / "choices.jsonl")})
    scores = dlora.simulate(config)["runs"]["dec-lora"]["consensus"]
    # the same question with either answer: half are right whatever the model thinks
    assert scores["accuracy"] == 0.5
    assert scores["perplexity"] == pytest.approx(
        torch.tensor(scores["loss"], dtype=torch.float64).exp().item()
    )


def test_a_run_that_diverges_says_so(make_config: MakeConfig) -> None:
    config = make_config(
        **{"train.learning_rate": 1e30, "train.optimizer": "sgd", "train.max_grad_norm": None}
    )
    with pytest.raises(
        dlora.UserError,
        match=r"dec-lora diverged in round \d: the loss of peer-.* lower train.learning_rate",
    ):
        dlora.simulate(config)
