"""A model folder that cannot be trained is refused before anything is written, and nothing in it
makes Python run.
"""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.errors import ConfigError, ModelError
from dlora.model.load import load_body_network, load_tokenizer, resolve_device
from dlora.run.prepare import prepare
from kit import families, tiny_models
from kit.adapter_folders import printed_and_loaded
from kit.call_cli import call, contents, furnish

pytestmark = pytest.mark.usefixtures("no_page")

MakeConfig = Callable[..., Config]


def edited(folder: Path, model: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of a model folder with other keys in its config.json."""
    shutil.copytree(model, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | dict(changes)))
    return folder


def family_folder(folder: Path, family: str, factory: Any = transformers.AutoModel) -> Path:
    """A tiny checkpoint of any family, with the tests' tokenizer."""
    config = families.tiny_config(family)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        factory.from_config(config).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads standard input fails; `yes |` would have said yes."""

    def ask(*_: Any) -> str:
        raise AssertionError("a question on standard input")

    monkeypatch.setattr(builtins, "input", ask)


def own_code(folder: Path) -> None:
    """Python that a folder brings: whoever runs it leaves a file."""
    (folder / "own.py").write_text(
        f"open({str(folder / 'it-ran')!r}, 'w').close()\nclass C: pass\nclass M: pass\nclass T:"
        " pass\n"
    )


AUTO_MAP = {
    "AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForSequenceClassification": "own.M",
    "AutoTokenizer": ["own.T", None]
}  # fmt: skip


def test_code_of_an_unknown_architecture_never_runs(
    make_config: MakeConfig, model_folder: Callable[..., Path], tmp_path: Path, never_asks: None
) -> None:
    """Field case 31: auto_map with a model_type that transformers has no class of."""
    folder = edited(
        tmp_path / "m", model_folder("bert"), {"model_type": "own", "auto_map": AUTO_MAP}
    )
    own_code(folder)
    with pytest.raises(
        ModelError,
        match=r"architecture own is Python code of its own \(auto_map\).*take an architecture",
    ):
        prepare(make_config(model=str(folder)))
    with pytest.raises(ModelError, match="auto_map"):
        load_body_network(CloudConfig.parse({"model": str(folder)}))
    assert not (folder / "it-ran").exists()


def test_code_beside_a_known_architecture_never_runs(
    make_config: MakeConfig, model_folder: Callable[..., Path], tmp_path: Path, never_asks: None
) -> None:
    """Field case 31: the class is transformers' own, whatever else auto_map names; the tokenizer's
    likewise.
    """
    folder = edited(tmp_path / "m", model_folder("bert"), {"auto_map": AUTO_MAP})
    own_code(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": AUTO_MAP}))
    assert type(prepare(make_config(model=str(folder))).model.network).__module__.startswith(
        "transformers.models.bert"
    )
    load_tokenizer(str(folder))
    assert not (folder / "it-ran").exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"_attn_implementation": "somebody/kernel"},
        {"attn_implementation": "somebody/kernel"},
        {"attn_implementation": {"": "sdpa", "text": "somebody/kernel:attention"}},
        {"text_config": {"_attn_implementation": "somebody/kernel"}},
        {"experts_implementation": "somebody/kernel"},
    ],
)
def test_kernels_of_the_hub_are_refused(
    make_config: MakeConfig, model_folder: Callable[..., Path], tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Field case 31: a config that names code for attention which would be fetched."""
    folder = edited(tmp_path / "m", model_folder("bert"), keys)
    with pytest.raises(
        ModelError, match=r"config.json asks for .*implementation somebody/kernel.*remove that key"
    ):
        prepare(make_config(model=str(folder)))
    with pytest.raises(ModelError, match="somebody/kernel"):
        load_body_network(CloudConfig.parse({"model": str(folder)}))


def test_pickled_weights_are_refused(
    make_config: MakeConfig, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Field case 31: weights in pytorch_model.bin, alone or named by an index of safetensors."""
    folder = shutil.copytree(model_folder("bert"), tmp_path / "m")
    weights = transformers.AutoModel.from_pretrained(folder).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    prepare(make_config(model=str(folder)))  # beside safetensors it is not read
    (folder / "model.safetensors").rename(tmp_path / "aside")
    for load in (
        lambda: prepare(make_config(model=str(folder))),
        lambda: load_body_network(CloudConfig.parse({"model": str(folder)})),
    ):
        with pytest.raises(
            ModelError, match=r"pytorch_model.bin is no safetensors file.*save_pretrained"
        ):
            load()
    (tmp_path / "aside").rename(folder / "other.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"index.json names pytorch_model.bin; expected safetensors"
    ):
        prepare(make_config(model=str(folder)))


def test_an_adapter_is_no_model(
    make_config: MakeConfig, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Field case 24: transformers would load another folder's model and put this adapter under
    ours, unsaid.
    """
    folder = shutil.copytree(model_folder("bert"), tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="it is an adapter; give the model that it belongs to"):
        prepare(make_config(model=str(folder)))


def test_more_tokens_than_rows_is_found_by_a_dry_run(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field case 4: exit 2 with both numbers, nothing written; fewer tokens than rows stay
    allowed.
    """
    furnish(tmp_path / "work", model_folder("bert"))
    monkeypatch.chdir(tmp_path / "work")
    grown = tiny_models.tokenizer()
    grown.add_tokens(["<new-1>", "<new-2>"])
    grown.save_pretrained("model")
    before = contents(Path())
    outcome = call("simulate", "run.yaml", "--dry-run")
    assert outcome.exit_code == 2 and outcome.err.count("\n") == 1
    assert "its tokenizer has 22 tokens, its embedding 20 rows" in outcome.err
    assert contents(Path()) == before
    model = transformers.AutoModel.from_pretrained("model")
    model.resize_token_embeddings(64)
    model.save_pretrained("model")
    assert call("simulate", "run.yaml", "--dry-run").exit_code == 0


def test_t5_as_a_classifier_trains_as_with_peft(make_config: MakeConfig, tmp_path: Path) -> None:
    """Field case 5: T5 looks at a linear's weight before it calls it; PEFT gives the printed
    loss.
    """
    folder = family_folder(tmp_path / "t5", "t5")
    config = make_config(model=str(folder), **{"peers.count": 2, "peers.group_size": 1})
    printed, loaded = printed_and_loaded(config)
    assert loaded == pytest.approx(printed, abs=1e-5)


def test_t5_as_a_language_model_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """Field case 5: the message names the architecture and the task, and no folders."""
    folder = family_folder(tmp_path / "t5", "t5")
    with pytest.raises(ModelError) as refusal:
        prepare(make_config("llama", "causal-lm", model=str(folder)))
    assert "task causal-lm wants a decoder" in str(refusal.value) and "architecture t5" in str(
        refusal.value
    )
    assert "folder" not in str(refusal.value)


def test_an_architecture_whose_forward_fails_is_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Field case 5, its kind: the mean over T5's tokens, which its forward cannot give without a
    second text.
    """
    folder = family_folder(tmp_path / "t5", "t5")
    with pytest.raises(
        ModelError,
        match=r"forward of MeanPooledClassifier fails on the first rows .*task or pooling",
    ):
        prepare(make_config(model=str(folder), pooling="mean"))


def test_an_update_that_would_be_passed_by_is_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Field case 5, its kind: Mamba multiplies by dt_proj's weight itself, so that its update would
    never count.
    """
    folder = family_folder(tmp_path / "mamba", "mamba", transformers.AutoModelForCausalLM)
    config = make_config(
        "llama", "causal-lm", model=str(folder), **{"lora.target_modules": ["dt_proj", "in_proj"]}
    )
    with pytest.raises(
        ModelError, match=r"reads the weight of dt_proj itself.*lora.target_modules: \[in_proj\]"
    ):
        prepare(config)


def test_a_model_that_changes_its_weights_is_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Field case 5, its kind: RWKV divides weights while it scores, and would not divide their
    updates.
    """
    folder = family_folder(tmp_path / "rwkv", "rwkv", transformers.AutoModelForCausalLM)
    with pytest.raises(ModelError, match="changes its weights while it runs"):
        prepare(make_config("llama", "causal-lm", model=str(folder)))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("target_parameters", ["w"], "target_parameters: dlora adapts linears only"),
        ("init", "pissa", "init: it is called init_lora_weights"),
        ("init_lora_weights", "eva", "init_lora_weights eva: dlora knows true, gaussian, pissa"),
        ("init_lora_weights", False, "init_lora_weights false: dlora knows true"),
        ("layers_pattern", "layer", "layers_pattern: the first number in a name is its layer"),
    ],
)
def test_what_peft_has_and_dlora_not_yet(
    make_config: MakeConfig, key: str, value: Any, says: str
) -> None:
    """Field cases 24 and 25: the line says so and what to do instead, not merely that the key is
    unknown.
    """
    with pytest.raises(ConfigError, match=f"^lora: {says}"):
        make_config(**{f"lora.{key}": value})


def test_auto_is_the_cpu_where_torch_is_built_for_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain torch on Linux brings CUDA, and names it also on a machine without a driver."""

    def current(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    assert resolve_device("auto") == torch.device("cpu")
