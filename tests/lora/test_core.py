"""The core: laws 1 to 3 for it, an adapter that PEFT reads, a frame that is computed once and
handed round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import dlora
from dlora.config.run import Config
from dlora.data.batches import collate
from dlora.decentralized.peer.mismatch import difference
from dlora.events.log import read_log
from dlora.lora import core, stacked
from dlora.lora.core import DIRECTIONS_FILE, read_directions, top_directions, write_directions
from dlora.lora.factors import product
from dlora.model.layers import LINEAR
from dlora.model.load import load_model, load_tokenizer
from dlora.run.prepare import Prepared, prepare
from dlora.train import forward

pytestmark = pytest.mark.usefixtures("no_page")

MakeConfig = Callable[..., Config]
CORE = {"lora.placement": "core", "eval_every": 0}
TARGETS = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "down_proj"],
}


def adapter(config: Config, which: str = "consensus") -> dict[str, Tensor]:
    return load_file(Path(config.output_dir, which, "adapter_model.safetensors"))


def deltas(pairs: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """scaling x B A of every module's pair."""
    modules = [name.removesuffix(".lora_A") for name in pairs if name.endswith(".lora_A")]
    return {
        name: product(pairs[f"{name}.lora_A"], pairs[f"{name}.lora_B"], scaling) for name in modules
    }


def delta_weights(config: Config, which: str = "consensus") -> dict[str, Tensor]:
    """Those of a saved adapter."""
    weights = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): t
        for name, t in adapter(config, which).items()
    }
    return deltas(
        {name: tensor[None] for name, tensor in weights.items()},
        config.lora.lora_alpha / config.lora.r,
    )


def off(ours: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """|D - D'| / |D'| over all tensors."""
    assert ours.keys() == reference.keys() and reference
    distance = torch.cat([(ours[name] - reference[name]).flatten() for name in reference]).norm()
    return float(distance / torch.cat([tensor.flatten() for tensor in reference.values()]).norm())


def train_dense(config: Config, prepared: Prepared, peer: int) -> dict[str, Tensor]:
    """One peer by itself and without our layer: W + scaling x B M A is written out as a whole
    matrix, M and head train.
    """
    model, train = prepared.model, config.train
    network = load_model(config, load_tokenizer(config.model), prepared.data.label_names).network
    trained = {name: tensor.clone().requires_grad_() for name, tensor in model.initial.items()}
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[train.optimizer](trained.values(), lr=train.learning_rate, weight_decay=0.0)
    rows = train.per_device_train_batch_size
    for step in range(train.rounds):
        weights = {}
        for name, tensor in trained.items():
            module, _, leaf = name.rpartition(".")
            if leaf != "lora_M":
                weights[name] = tensor
                continue
            layer = network.get_submodule(module)
            added = (
                model.directions[f"{module}.lora_B"] @ tensor @ model.directions[f"{module}.lora_A"]
            )
            added = (added.T if isinstance(layer, Conv1D) else added) * (
                config.lora.lora_alpha / config.lora.r
            )
            weights[f"{module}.weight"] = layer.weight.detach() + added
        examples = [
            prepared.data.peers[prepared.names[peer]][row]
            for row in prepared.streams[peer].take(step * rows, rows)
        ]
        batch = collate(examples, prepared.pad_token_id)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = functional_call(network, weights, (), inputs).logits
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        assert train.max_grad_norm is not None
        torch.nn.utils.clip_grad_norm_(trained.values(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: (tensor - model.initial[name]).detach() for name, tensor in trained.items()}


@pytest.mark.parametrize(
    ("family", "optimizer"),
    [
        ("bert", "adamw"),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [("gpt2", "sgd"), ("bert", "sgd"), ("llama", "adamw")]
        ),
    ],
)
def test_stacked_cores_are_separate_runs(
    make_config: MakeConfig, family: str, optimizer: str
) -> None:
    """Laws 1 and 2: two stacked participants against dense weights, each by itself; only M and the
    head train.
    """
    config = make_config(
        family, **CORE, **{
            "peers.count": 2, "peers.topology": {"kind": "edges", "edges": [[0, 1]]},
            "compare": ["local"],
            "train.rounds": 10, "train.local_steps": 1, "train.optimizer": optimizer,
            "train.max_grad_norm": 0.5,
            "train.learning_rate": 5e-3 if optimizer == "adamw" else 0.1,
            "lora.target_modules": TARGETS[family],
        },
    )  # fmt: skip
    dlora.simulate(config)
    prepared = prepare(config)
    ends = load_file(Path(config.output_dir, "checkpoints/local/round-000010/factors.safetensors"))
    assert {name.rpartition(".")[2] for name in ends} <= {
        "lora_M",
        "weight",
        "bias",
    } and prepared.model.directions
    for peer in range(2):
        reference = train_dense(config, prepared, peer)
        update = {name: ends[name][peer] - prepared.model.initial[name] for name in reference}
        cores = [name for name in reference if name.endswith("lora_M")]
        # from zero every core has begun to move
        assert all(reference[name].any() for name in cores)
        assert off({n: update[n] for n in cores}, {n: reference[n] for n in cores}) < 1e-4
        heads = reference.keys() - set(cores)
        assert off({n: update[n] for n in heads}, {n: reference[n] for n in heads}) < 1e-4


def test_complete_graph_with_one_sgd_step_is_pooled_sgd_also_in_products(
    make_config: MakeConfig,
) -> None:
    """Law 3, and what pairs do not give: the mean of the peers' delta weights is the delta weight
    of the mean.
    """
    keys = {
        "eval_every": 0, "train.rounds": 6, "train.local_steps": 1, "train.optimizer": "sgd",
        "train.learning_rate": 0.2,
        "train.max_grad_norm": None, "peers.topology": {"kind": "complete"}, "compare": ["pooled"],
        "lora.target_modules": TARGETS["bert"],
    }  # fmt: skip
    config = make_config(**keys | {"lora.placement": "core"})
    dlora.simulate(config)
    pooled = load_file(
        Path(config.output_dir, "checkpoints/pooled/round-000006/factors.safetensors")
    )
    assert (
        off(
            delta_weights(config), deltas(core.pairs(pooled, prepare(config).model.directions), 2.0)
        )
        < 1e-5
    )


@pytest.mark.parametrize(("placement", "exact"), [("core", True), ("literal", False)])
def test_the_mean_of_cores_is_the_mean_of_products(
    make_config: MakeConfig, placement: str, exact: bool
) -> None:
    config = make_config(**CORE | {"lora.placement": placement, "train.learning_rate": 2e-2})
    dlora.simulate(config)
    peers = [delta_weights(config, f"peers/peer-{peer}") for peer in range(4)]
    mean = {name: torch.stack([peer[name] for peer in peers]).mean(0) for name in peers[0]}
    assert off(peers[0], mean) > 0.1  # they are no copies of each other
    assert (off(delta_weights(config), mean) < 1e-5) == exact


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_adapter_is_an_ordinary_one(make_config: MakeConfig, family: str) -> None:
    """PEFT reads it, and computes the logits that the cores give; `dlora eval` reads the cores back
    bit for bit.
    """
    config = make_config(
        family, **CORE, **{"train.learning_rate": 2e-2, "lora.target_modules": TARGETS[family]}
    )
    summary = dlora.simulate(config)
    prepared = prepare(config)
    batch = collate(prepared.data.evaluation[:8], prepared.pad_token_id)
    factors = load_file(
        next(Path(config.output_dir).glob("checkpoints/dec-lora/*/factors.safetensors"))
    )
    prepared.model.use({name: tensor[:1] for name, tensor in factors.items()})
    base, _ = dlora.load_base(config.output_dir)
    with torch.no_grad():
        ours = forward(prepared.model, batch)
        plain = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        theirs = peft.PeftModel.from_pretrained(
            base, str(Path(config.output_dir, "peers/peer-0"))
        ).eval()
        peft_logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert (ours - peft_logits).abs().max() < 1e-5 < (ours - plain).abs().max() / 100
    assert dlora.score(config.output_dir)["consensus"] == summary["runs"]["dec-lora"]["consensus"]


def test_messages_are_tiny(make_config: MakeConfig) -> None:
    config = make_config(**CORE, **{"lora.train_head": False, "lora.r": 2})
    prepared = prepare(config)
    modules = len(prepared.trained)
    assert modules == 12 and all(tensor.shape == (2, 2) for tensor in prepared.trained.values())
    # the numbers, and their names
    assert 4 * 4 * modules < prepared.message_bytes < 4 * 4 * modules + 120 * modules


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_frame_is_the_svd_with_signs(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    lora_A, lora_B = top_directions(weight, 4)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(lora_B @ lora_A, left[:, :4] @ right[:4])
    torch.testing.assert_close(
        lora_B @ torch.diag(values[:4]) @ lora_A, left[:, :4] @ torch.diag(values[:4]) @ right[:4]
    )
    torch.testing.assert_close(lora_B.T @ lora_B, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(lora_A @ lora_A.T, torch.eye(4, dtype=torch.float64))
    assert (lora_B.gather(0, lora_B.abs().argmax(dim=0, keepdim=True)) > 0).all()
    again = top_directions(-weight, 4)
    torch.testing.assert_close(again[1], lora_B)


def refuse_to_compute(*arguments: Any) -> None:
    raise AssertionError("the frame was computed again")


def test_resume_reads_the_frame(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(rounds: int, folder: str) -> Config:
        return make_config(
            **CORE,
            **{"train.rounds": rounds, "train.local_steps": 1},
            output_dir=str(tmp_path / folder),
        )

    dlora.simulate(config(2, "long"))
    dlora.simulate(config(1, "short"))
    monkeypatch.setattr(stacked, "compute_directions", refuse_to_compute)
    dlora.simulate(config(2, "short"), resume=True)
    whole, resumed = adapter(config(2, "long")), adapter(config(2, "short"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    frame = read_directions(tmp_path / "short" / DIRECTIONS_FILE)
    # another machine's SVD: as good, and not the same
    turned = {name: -tensor for name, tensor in frame.items()}
    write_directions(tmp_path / "short" / DIRECTIONS_FILE, turned)
    with pytest.raises(dlora.UserError, match="resume: the frame of manifest.json was"):
        dlora.simulate(config(3, "short"), resume=True)


def test_a_frame_is_made_once_and_handed_round(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "handed.safetensors"
    keys = {**CORE, "lora.frame": str(file), "train.rounds": 1}
    dlora.simulate(make_config(**keys, output_dir=str(tmp_path / "one")))
    monkeypatch.setattr(stacked, "compute_directions", refuse_to_compute)
    dlora.simulate(make_config(**keys, output_dir=str(tmp_path / "two")))
    digests = {
        json.loads((tmp_path / run / "manifest.json").read_text())["frame"]
        for run in ("one", "two")
    }
    assert (
        len(digests) == 1 and file.read_bytes() == (tmp_path / "two" / DIRECTIONS_FILE).read_bytes()
    )
    frame = read_directions(file)
    # a part of it is a frame too
    fewer = prepare(make_config(**keys | {"lora.target_modules": ["query"]})).model.directions
    assert 0 < len(fewer) < len(frame) and all(
        torch.equal(frame[name], tensor) for name, tensor in fewer.items()
    )
    with pytest.raises(dlora.UserError, match=r"made for another lora\.r"):
        prepare(make_config(**keys | {"lora.r": 3}))
    write_directions(file, fewer)
    with pytest.raises(dlora.UserError, match="is adapted here but not in the frame"):
        prepare(make_config(**keys))
    name = next(name for name in frame if name.endswith("lora_A"))
    for spoilt in (frame[name] * 1.01, frame[name] * torch.nan):
        write_directions(file, frame | {name: spoilt})
        with pytest.raises(dlora.UserError, match="is not of this model's weight"):
            prepare(make_config(**keys))
    for content in ({name: frame[name].half()}, {name: frame[name][0].clone()}):
        save_file(content, file)
        with pytest.raises(dlora.UserError, match="handed.safetensors is no frame"):
            prepare(make_config(**keys))
    file.write_bytes(b"not tensors")
    with pytest.raises(dlora.UserError, match="handed.safetensors cannot be read"):
        prepare(make_config(**keys))


def test_a_resumed_core_run_names_what_changed(make_config: MakeConfig, tmp_path: Path) -> None:
    file = tmp_path / "handed.safetensors"
    keys = {**CORE, "train.rounds": 1, "output_dir": str(tmp_path / "run")}
    dlora.simulate(make_config(**keys, **{"lora.frame": str(file)}))
    with pytest.raises(dlora.UserError, match=r"resume: lora.r was 4 and is 3"):
        dlora.simulate(make_config(**keys | {"lora.r": 3}), resume=True)
    handed = keys | {"train.rounds": 2, "lora.frame": str(file)}
    dlora.simulate(make_config(**handed), resume=True)
    write_directions(file, {name: -tensor for name, tensor in read_directions(file).items()})
    with pytest.raises(
        dlora.UserError, match="handed.safetensors is another frame than .*run/frame.safetensors"
    ):
        dlora.simulate(make_config(**handed | {"train.rounds": 3}), resume=True)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc: where not even root can write")
def test_a_frame_that_cannot_be_kept_where_it_should_be_costs_no_folder(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        **CORE, **{"lora.frame": "/proc/frame.safetensors", "output_dir": str(tmp_path / "run")}
    )
    with pytest.raises(dlora.UserError, match="/proc/frame.safetensors cannot be written"):
        dlora.simulate(config)
    assert not Path(config.output_dir).exists()


def test_peers_whose_frames_differ_are_told_what_to_do() -> None:
    ours, theirs = ({"frame": digit * 64, "initial_factors": "0", "rounds": 3} for digit in "ab")
    said = difference("north", json.dumps(ours), "south", json.dumps(theirs))
    assert (
        f'frame is "{"a" * 64}" at north' in said
        and "the file that lora.frame names, and hand it round" in said
    )
    begun = {"initial_factors": "1"} | {"frame": "a" * 64, "rounds": 3}
    said = difference("north", json.dumps(ours), "south", json.dumps(begun))
    assert 'initial_factors is "0" at north and "1" at south; they follow from lora.adapter' in said
    # what it may follow from
    said = difference("north", json.dumps(ours), "south", json.dumps(theirs | {"rounds": 4}))
    assert "rounds is 3 at north and 4 at south; make them alike" in said


def test_of_long_values_the_part_that_differs_is_told() -> None:
    targets = [f"encoder.layer.{number}.query" for number in range(40)]
    ours, theirs = {"lora": {"r": 8, "targets": targets}}, {"lora": {"r": 4, "targets": targets}}
    said = difference("north", json.dumps(ours), "south", json.dumps(theirs))
    assert said == "south is in another run: lora.r is 8 at north and 4 at south; make them alike"
    theirs = {"lora": {"r": 8, "targets": [*targets[:-1], "pooler"]}}
    said = difference("north", json.dumps(ours), "south", json.dumps(theirs))
    assert (
        'lora.targets (where they differ) is ["encoder.layer.39.query"] at north and ["pooler"] at'
        " south" in said
    )
    said = difference("north", json.dumps(ours), "south", json.dumps({"lora": "none"}))
    assert 'and "none" at south' in said


@pytest.mark.parametrize(
    ("family", "quantization"),
    [pytest.param("llama", "nf4", marks=pytest.mark.slow), ("bert", "int8")],
)
def test_a_quantised_base_has_a_frame_of_what_it_computes(
    make_config: MakeConfig, family: str, quantization: str
) -> None:
    pytest.importorskip("bitsandbytes")
    config = make_config(
        family,
        **CORE,
        **{"quantization": quantization, "train.rounds": 15, "train.learning_rate": 5e-2},
    )
    dlora.simulate(config)
    losses = [
        event["loss"]
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event["event"] == "round"
    ]
    assert losses[-1] < losses[0] - 0.05
    frame, plain = read_directions(Path(config.output_dir, DIRECTIONS_FILE)), make_config(family)
    network = load_model(plain, load_tokenizer(plain.model), ["no", "yes"]).network
    for name, layer in network.named_modules():
        if f"{name}.lora_A" in frame and isinstance(layer, LINEAR):
            read = torch.nn.functional.normalize(frame[f"{name}.lora_B"].T @ layer.weight, dim=1)
            # near the weight, and not it
            assert 0 < (read - frame[f"{name}.lora_A"]).norm() / read.norm() < 0.15
