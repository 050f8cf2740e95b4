"""`dlora export --merge`: the folder loads with transformers alone and gives the printed score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.errors import RunError
from dlora.programs.export import export_merged
from dlora.run.prepare import prepare
from kit.call_cli import call
from kit.updates import KINDS

pytestmark = [
    pytest.mark.usefixtures("no_page"),
    pytest.mark.filterwarnings("ignore:peers train one at a time"),
]
MakeConfig = Callable[..., Config]

slow = pytest.mark.slow
QUICK: dict[str, Any] = {"peers.count": 2, "train.rounds": 2, "train.learning_rate": 2e-2}
GPT2: dict[str, Any] = {"lora.target_modules": ["c_attn", "c_fc"]}
NF4: dict[str, Any] = {"quantization": "nf4"}


def score_alone(config: Config, folder: Path) -> dict[str, float]:
    """What transformers, without PEFT and dlora, makes of the evaluation rows."""
    classifies = config.task == "classification"
    factory: Any = (
        transformers.AutoModelForSequenceClassification
        if classifies
        else transformers.AutoModelForCausalLM
    )
    model = factory.from_pretrained(folder).eval()
    batch = collate(prepare(config).data.evaluation, 0)
    with torch.no_grad():
        result = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        )
    found = {"loss": result.loss.item()}
    if classifies:
        found["accuracy"] = (result.logits.argmax(-1) == batch.labels).double().mean().item()
    return found


@pytest.mark.parametrize(
    ("family", "task", "overrides"),
    [
        ("llama", "causal-lm", KINDS["dora"]),
        *(
            pytest.param(*one, marks=slow)
            for one in [
                ("bert", "classification", {}),
                ("roberta", "classification", {}),  # its head has two linears
                ("bert", "classification", {"lora.train_head": False}),
                ("bert", "classification", KINDS["dora"]),
                ("bert", "classification", KINDS["pissa"]),
                ("bert", "classification", KINDS["biases"]),
                ("bert", "classification", KINDS["ia3"]),
                ("llama", "classification", KINDS["rslora"]),
                ("bert", "classification", {"lora.placement": "core"}),
                ("llama", "causal-lm", {}),
                ("llama", "causal-lm", KINDS["pissa"]),
                ("gpt2", "causal-lm", GPT2 | KINDS["dora"]),
                ("gpt2", "causal-lm", GPT2 | KINDS["pissa"]),
                ("opt", "causal-lm", {"lora.rank_pattern": {"q_proj": 2}}),
            ]
        ),
    ],
)
def test_transformers_alone_gives_the_printed_score(
    make_config: MakeConfig, family: str, task: str, overrides: dict[str, Any]
) -> None:
    config = make_config(family, task, **QUICK | overrides)
    printed = dlora.simulate(config)["runs"]["dec-lora"]["consensus"]
    outcome = call("export", config.output_dir, "--merge")
    folder = Path(config.output_dir, "merged", "consensus")
    assert (outcome.exit_code, outcome.out, outcome.err) == (0, f"{folder}\n", "")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert not [path for path in folder.parent.rglob("*") if "adapter" in path.name]
    for key, value in score_alone(config, folder).items():
        assert value == pytest.approx(printed[key], abs=1e-5), key
    # the model without the adapter gives another score
    base, _ = dlora.load_base(config.output_dir)
    base.save_pretrained(folder.parent / "untrained")
    untrained = score_alone(config, folder.parent / "untrained")
    assert abs(untrained["loss"] - printed["loss"]) > 1e-3
    saved = transformers.AutoConfig.from_pretrained(folder)
    source = transformers.AutoConfig.from_pretrained(config.model)
    # the run's dropout of zero is not the model's
    for key in ("hidden_dropout_prob", "attention_dropout", "resid_pdrop", "dropout"):
        assert getattr(saved, key, None) == getattr(source, key, None)
    if task == "classification":
        assert saved.id2label == {0: "0", 1: "1"}
    words = ("w1 w2 w3",)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(one) for one in (folder, config.model)]
    assert tokenizers[0](*words).input_ids == tokenizers[1](*words).input_ids


@slow
def test_a_quantised_model_is_dequantised(make_config: MakeConfig) -> None:
    pytest.importorskip("bitsandbytes")
    config = make_config("llama", "causal-lm", **QUICK | NF4)
    printed = dlora.simulate(config)["runs"]["dec-lora"]["consensus"]
    with pytest.warns(UserWarning, match="quantization nf4: the weights are dequantised"):
        folder = export_merged(config.output_dir)
    assert score_alone(config, folder)["loss"] == pytest.approx(printed["loss"], abs=1e-5)
    assert not hasattr(transformers.AutoConfig.from_pretrained(folder), "quantization_config")


def test_one_peer_is_merged_and_mistakes_are_told(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**QUICK | {"peers.count": 4})  # on a ring: each ends with its own
    run = config.output_dir
    said = call("export", run, "--merge")
    assert said.exit_code == 2 and "holds no run" in said.err, said
    monkeypatch.setattr("dlora.run.simulated.MOST_FOLDERS", 1)
    result = dlora.simulate(config)["runs"]["dec-lora"]
    out = tmp_path / "one"
    assert call("export", run, "--merge", "--peer", "peer-1", "-o", str(out)).exit_code == 0
    own, average = result["peers"]["peer-1"]["loss"], result["consensus"]["loss"]
    assert score_alone(config, out)["loss"] == pytest.approx(own, abs=1e-5)
    assert own != pytest.approx(average, abs=1e-4)
    for arguments, message in (
        (["--merge", "-o", str(out)], "is there already; name another folder"),
        (["--merge", "--peer", "nobody"], "holds no peer nobody"),
        ([], "--peer is missing"),
    ):
        said = call("export", run, *arguments)
        assert said.exit_code == 2 and message in said.err and said.err.count("\n") == 1, said
    assert not Path(run, "merged").exists()
    # a folder in which nobody can write
    said = call("export", run, "--merge", "-o", str(out / "config.json" / "below"))
    assert said.exit_code == 2 and "cannot be written" in said.err, said


def test_the_mean_over_tokens_is_refused(make_config: MakeConfig) -> None:
    config = make_config(pooling="mean", **QUICK)
    dlora.simulate(config)
    with pytest.raises(RunError, match=r"pooling: mean.*; load it with"):
        export_merged(config.output_dir)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"bottleneck": {"r": 2}}, "no weight can hold; the README.md of its folder has code"),
        (
            {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}},
            "virtual tokens stand before the text, and no weight can hold them",
        ),
    ],
)
def test_what_no_weight_can_hold_is_refused(
    make_config: MakeConfig, overrides: dict[str, Any], says: str
) -> None:
    config = make_config(lora={}, **QUICK | overrides)
    dlora.simulate(config)
    with pytest.raises(RunError, match=says):
        export_merged(config.output_dir)
