"""What is written loads elsewhere: PEFT gives the printed loss, vLLM and SGLang find what they
read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import dlora
from dlora.config.run import Config
from dlora.errors import Interrupted, ModelError, RunError
from dlora.lora.adapter_io import save_adapter
from dlora.lora.factors import stack
from dlora.model.load import load_tokenizer
from dlora.run.prepare import prepare
from kit import families, tiny_models
from kit.adapter_folders import printed_and_loaded
from kit.run_folders import assert_identical, factors_of, stop_after
from kit.updates import GOES_ON

pytestmark = pytest.mark.usefixtures("no_page")

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize(
    "family", ["modernbert", pytest.param("modernbert-decoder", marks=pytest.mark.slow)]
)
def test_a_head_with_weights_that_are_no_linears(
    make_config: MakeConfig, tmp_path: Path, family: str
) -> None:
    """Field case 1: ModernBERT's head has a norm; PEFT loads the folder and gives the printed
    loss.
    """
    folder = tmp_path / family
    network = transformers.AutoModelForSequenceClassification.from_config(
        families.tiny_config(family)
    )
    # no value that a fresh one would have
    torch.nn.init.uniform_(network.head.norm.weight, 0.5, 2.0)
    network.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    printed, loaded = printed_and_loaded(make_config(model=str(folder), **{"peers.count": 2}))
    assert loaded == pytest.approx(printed, abs=1e-5)


def test_experts_out_of_reach_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    """Field case 3: transformers keeps experts in one tensor; all-linear says which share of the
    blocks it reaches.
    """
    folder = tmp_path / "moe"
    transformers.AutoModelForCausalLM.from_config(
        families.tiny_config("qwen3_moe")
    ).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    with pytest.warns(
        UserWarning, match=r"reaches \d+ % of .*: .*mlp.experts.gate_up_proj.* stay frozen"
    ):
        prepare(make_config("llama", "causal-lm", model=str(folder)))
    # nothing to say
    prepare(
        make_config("llama", "causal-lm", model=str(folder), **{"lora.target_modules": ["q_proj"]})
    )


def test_linears_that_peft_takes_for_experts(make_config: MakeConfig, tmp_path: Path) -> None:
    """Field case 3, its sibling: PEFT would load no update of the dense layers beside experts, so
    none is trained.
    """
    folder = tmp_path / "moe"
    transformers.AutoModelForCausalLM.from_config(families.tiny_config("glm4_moe")).save_pretrained(
        folder
    )
    tiny_models.tokenizer().save_pretrained(folder)
    config = make_config("llama", "causal-lm", model=str(folder), **{"peers.count": 2})
    with pytest.warns(UserWarning, match=r"reaches \d+ % .*experts"):
        printed, loaded = printed_and_loaded(config)
    assert loaded == pytest.approx(printed, abs=1e-5)
    named = make_config(
        "llama",
        "causal-lm",
        model=str(folder),
        **{"lora.target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    )
    with pytest.raises(
        ModelError,
        match=r"PEFT takes .* for weights of experts.* leave down_proj, gate_proj, up_proj out",
    ):
        prepare(named)


@pytest.mark.parametrize("family", ["mamba", pytest.param("falcon_h1", marks=pytest.mark.slow)])
def test_all_linear_leaves_out_what_peft_refuses(
    make_config: MakeConfig, tmp_path: Path, family: str
) -> None:
    """Field case 3, other hybrids: Mamba's out_proj is read by a kernel; the rest trains, and PEFT
    gives the printed loss.
    """
    folder = tmp_path / family
    transformers.AutoModelForCausalLM.from_config(families.tiny_config(family)).save_pretrained(
        folder
    )
    tiny_models.tokenizer().save_pretrained(folder)
    config = make_config("llama", "causal-lm", model=str(folder), **{"peers.count": 2})
    with pytest.warns(UserWarning, match=r"reaches \d+ %"):
        printed, loaded = printed_and_loaded(config)
    assert loaded == pytest.approx(printed, abs=1e-5)


def test_a_head_that_shares_the_embedding_is_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Field case 6: an update of lm_head would, merged, be one of the token embedding too."""
    folder = tmp_path / "tied"
    config = tiny_models.config("llama")
    config.tie_word_embeddings = True
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    targets = {"lora.target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(
        ModelError, match=r"lm_head shares its weight with model.embed_tokens.*leave lm_head out"
    ):
        prepare(make_config("llama", "causal-lm", model=str(folder), **targets))
    prepare(make_config("llama", "causal-lm", **targets))  # its own weight: allowed


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (
            "all-linear",
            ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        ),
        pytest.param(
            r".*layers\.1\..*(q|v)_proj",
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
            marks=pytest.mark.slow,
        ),
        (["v_proj", "q_proj"], ["q_proj", "v_proj"]),
    ],
)
def test_servers_find_what_they_read(
    make_config: MakeConfig, targets: Any, written: list[str]
) -> None:
    """Field case 26: whole lora_alpha, modules as a sorted list, tokenizer and card beside the
    adapter, no path in it.
    """
    config = make_config(
        "llama", "causal-lm", **{"lora.target_modules": targets, "train.rounds": 1, "eval_every": 0}
    )
    printed, loaded = printed_and_loaded(config)
    assert loaded == pytest.approx(printed, abs=1e-5)
    folder = Path(config.output_dir, "consensus")
    text = (folder / "adapter_config.json").read_text()
    said = json.loads(text)
    assert said["target_modules"] == written
    assert '"lora_alpha": 8,' in text and said["bias"] == "none" and said["r"] == 4
    assert load_tokenizer_of(folder).get_vocab() == load_tokenizer(config.model).get_vocab()
    card = (folder / "README.md").read_text()
    # the next rank above 4 that vLLM has room for
    assert "--max-lora-rank 8" in card and str(Path(config.model).parent) not in card
    # a folder is no model of the hub, and its own name alone often says nothing
    assert card.startswith("---\nlibrary_name: peft")
    assert f"# A LoRA adapter for {'/'.join(Path(config.model).parts[-2:])}\n" in card
    for peer in Path(config.output_dir, "peers").iterdir():
        assert json.loads((peer / "adapter_config.json").read_text())["target_modules"] == written


DORA, PATTERN = "it refuses DoRA (`use_dora`)", "does not read `rank_pattern` and `alpha_pattern`"
MERGE = "`dlora export RUN --merge` writes the whole model"
# kind -> family, task, what of the config, what the card says of vLLM
IN_VLLM: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "lora": ("llama", "causal-lm", {}, ["vLLM: `--enable-lora --max-lora-rank 8`."]),
    "rank-16": ("llama", "causal-lm", {"lora.r": 16}, ["--max-lora-rank 16`."]),
    "rank-17": ("llama", "causal-lm", {"lora.r": 17}, ["--max-lora-rank 32`."]),
    "rank-513": ("llama", "causal-lm", {"lora.r": 513},
        ["does not load", "a rank of 512 at most, this one is 513.", MERGE]),
    "rslora": ("llama", "causal-lm", {"lora.use_rslora": True}, ["--max-lora-rank 8`."]),
    "core": ("llama", "causal-lm", {"lora.placement": "core"}, ["--max-lora-rank 8`."]),
    "gaussian": ("llama", "causal-lm", {"lora.init_lora_weights": "gaussian"},
        ["--max-lora-rank 8`."]),
    "pissa": ("llama", "causal-lm", {"lora.init_lora_weights": "pissa", "lora.r": 5},
        ["--max-lora-rank 16`."]),
    "pissa-rslora": ("llama", "causal-lm",
        {"lora.init_lora_weights": "pissa", "lora.r": 5, "lora.use_rslora": True},
        ["--max-lora-rank 16`."]),
    "dora": ("llama", "causal-lm", {"lora.use_dora": True}, ["does not load", DORA, MERGE]),
    "rank-pattern": ("llama", "causal-lm", {"lora.rank_pattern": {"q_proj": 2}},
        ["does not load", PATTERN, MERGE]),
    "alpha-pattern": ("llama", "causal-lm", {"lora.alpha_pattern": {"0.*.q_proj": 2.0}},
        ["does not load", PATTERN, MERGE]),
    # alpha / r is 2 everywhere: what vLLM does not read changes nothing
    "patterns-in-step": ("llama", "causal-lm",
        {"lora.rank_pattern": {"q_proj": 20}, "lora.alpha_pattern": {"q_proj": 40}},
        ["--max-lora-rank 32`."]),
    "classifier": ("llama", "classification", {},
        ["does not load", "it refuses `modules_to_save`, here score.", MERGE]),
    "classifier-at-rest": ("bert", "classification", {"lora.train_head": False},
        ["does not load", "here classifier.", MERGE]),
    "classifier-dora": ("bert", "classification", {"lora.use_dora": True},
        ["does not load", f"here classifier; {DORA}.", MERGE]),
    "mean": ("bert", "classification", {"pooling": "mean"},
        ["does not load this folder: it has no classifier that reads the mean."]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:lora.r 513")
@pytest.mark.parametrize("kind", IN_VLLM)
def test_the_card_says_whether_vllm_loads_the_folder(
    make_config: MakeConfig, tmp_path: Path, kind: str
) -> None:
    """By vLLM's own checks, read in its source; what the folder holds is what they read."""
    family, task, overrides, words = IN_VLLM[kind]
    prepared = prepare(make_config(family, task, **overrides))
    model = prepared.model
    save_adapter(tmp_path / "adapter", stack(model.initial, 1), model)
    card = " ".join((tmp_path / "adapter" / "README.md").read_text().split())
    for word in words:
        assert word in card, card
    loads = "does not load" not in words[0]
    assert ("--max-lora-rank" in card) == loads
    assert ("--merge" in card) == (MERGE in words)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    if loads:  # PEFTHelper.validate_legal, and the names that parse_fine_tuned_lora_name takes
        assert not said["modules_to_save"] and not said["use_dora"] and said["bias"] == "none"
        assert type(said["lora_alpha"]) is int or said["use_rslora"]
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
        room = int(card.partition("--max-lora-rank ")[2].partition("`")[0])
        assert max(min(tensor.shape) for tensor in names.values()) <= room


def load_tokenizer_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_that_begins_with_an_adapter_goes_on(
    make_config: MakeConfig, tmp_path: Path, dora: bool
) -> None:
    """Two runs of two rounds each, the second from the first one's average, are one run of four:
    on a complete graph all peers have the average after each round, and a batch holds all rows.
    """
    keys = {
        "lora.use_dora": dora,
        **GOES_ON,
        "data.limit": 64,
    }

    def ended(name: str, rounds: int, **more: Any) -> tuple[Config, dict[str, torch.Tensor]]:
        config = make_config(
            **keys, **more, **{"train.rounds": rounds}, output_dir=str(tmp_path / name)
        )
        dlora.simulate(config)
        return config, load_file(tmp_path / name / "consensus" / "adapter_model.safetensors")

    _, whole = ended("whole", 4)
    _, half = ended("half", 2)
    begun = {"lora.adapter": str(tmp_path / "half" / "consensus"), "seed": 0}
    config, rest = ended("rest", 2, **begun)
    assert (
        prepare(config).manifest["initial_factors"]
        != prepare(make_config(**keys)).manifest["initial_factors"]
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(rest[name], tensor, rtol=1e-4, atol=1e-6)
    assert any((half[name] - tensor).abs().max() > 1e-4 for name, tensor in whole.items())


def test_a_run_keeps_the_adapter_from_which_it_began(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Its head has a norm, whose weight no run trains. The run is resumed and scored again when
    the adapter's own folder is gone.
    """
    network = transformers.AutoModelForSequenceClassification.from_config(
        families.tiny_config("modernbert")
    )
    network.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    keys = {"model": str(tmp_path / "model"), "peers.count": 2}
    first = make_config(**keys, output_dir=str(tmp_path / "first"))
    dlora.simulate(first)
    given = tmp_path / "first" / "consensus"
    weights = load_file(given / "adapter_model.safetensors")
    [norm] = [name for name in weights if name.endswith("head.norm.weight")]
    save_file({**weights, norm: weights[norm] + 1}, given / "adapter_model.safetensors")
    config = make_config(
        **keys, **{"lora.adapter": str(given)}, output_dir=str(tmp_path / "second")
    )
    with pytest.raises(Interrupted):
        dlora.simulate(config, stop=stop_after(1))
    shutil.rmtree(given)
    summary = dlora.simulate(config, resume=True)
    printed = summary["runs"]["dec-lora"]["consensus"]["loss"]
    assert dlora.score(config.output_dir)["consensus"]["loss"] == pytest.approx(printed, abs=1e-5)
    ended = load_file(tmp_path / "second" / "consensus" / "adapter_model.safetensors")
    assert torch.equal(ended[norm], weights[norm] + 1)


@pytest.mark.parametrize("init", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_a_run_keeps_what_was_taken_out_of_the_weights(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    """Law 10 on a machine whose SVD has other last bits: what resumes or scores asks for none."""
    keys = {"lora.init_lora_weights": init, "peers.count": 2, "eval_every": 0}
    whole, config = (make_config(**keys, output_dir=str(tmp_path / name)) for name in "ab")
    dlora.simulate(whole)
    with pytest.raises(Interrupted):
        dlora.simulate(config, stop=stop_after(1))

    def another(*_: Any) -> None:
        raise AssertionError("computed anew")

    for name in ("pissa_init", "olora_init"):
        monkeypatch.setattr(LoraLayer, name, another)
    with pytest.raises(AssertionError, match="computed anew"):
        prepare(config)
    summary = dlora.simulate(config, resume=True)
    assert_identical(factors_of(config), factors_of(whole))
    for file in ("taken-out.safetensors", "consensus/adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    printed = summary["runs"]["dec-lora"]["consensus"]["loss"]
    assert dlora.score(config.output_dir)["consensus"]["loss"] == pytest.approx(printed, abs=1e-5)
    (tmp_path / "b" / "taken-out.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"taken-out.safetensors cannot be read"):
        dlora.score(config.output_dir)


def test_an_adapter_of_changed_weights_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """PEFT takes A and B out of the weights again when it loads such a folder."""
    config = make_config(**{"train.rounds": 1})
    dlora.simulate(config)
    folder = Path(config.output_dir, "consensus")
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | {"init_lora_weights": "pissa"}))
    with pytest.raises(ModelError, match=r"^lora.adapter: .*made with init_lora_weights pissa"):
        prepare(make_config(**{"lora.adapter": str(folder)}))


def test_what_cannot_be_taken_out_is_refused(make_config: MakeConfig) -> None:
    olora = {"lora.init_lora_weights": "olora", "lora.target_modules": ["c_attn"]}
    with pytest.raises(ModelError, match="stores its weight transposed"):
        prepare(make_config("gpt2", **olora))
    with pytest.raises(ModelError, match="rank 80, but .* has only"):
        prepare(make_config(**{"lora.init_lora_weights": "pissa", "lora.r": 80}))


def test_what_an_adapter_to_begin_with_must_be(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**{"train.rounds": 1, "lora.target_modules": ["query", "value"]})
    dlora.simulate(config)
    folder = Path(config.output_dir, "consensus")
    for more, says in (
        ({"lora.adapter": str(tmp_path)}, "is no folder with a LoRA adapter"),
        ({"lora.r": 2}, "has r 4, and the config has lora.r 2; make"),
        ({"lora.r": 2, "lora.lora_alpha": 1}, "has r 4, lora_alpha 8, .* lora.r 2, lora.lora_alph"),
        ({"lora.use_rslora": True}, "has use_rslora False"),
        ({"lora.target_modules": ["query"]}, "also holds .*value"),
        ({"lora.target_modules": ["query", "key"]}, "holds no .*key"),
    ):
        wrong = {"lora.target_modules": ["query", "value"], "lora.adapter": str(folder)} | more
        with pytest.raises(ModelError, match=f"^lora.adapter: .*{says}"):
            prepare(make_config(**wrong))
