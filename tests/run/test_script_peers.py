"""`dlora.Peer` with anything that trains: what is mixed, what is refused, what a crash costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import dlora
from dlora.errors import ConfigError, IdentityError, NeighbourError, RunError
from kit.script_peers import LOCK, Sites

NAMES = ("east", "north", "west")
COMPLETE = {"kind": "complete"}


def stirred(model: nn.Module, seed: int) -> None:
    """Change everything that trains, as training would, another way in each site."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * drawn.to(parameter.dtype))


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def enter(peer: dlora.Peer, model: nn.Module | dict[str, nn.Parameter]) -> None:
    with peer.joined(model):
        pass


class Bottleneck(nn.Module):
    """A bottleneck adapter by hand, beside a frozen linear."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)
        self.scale = nn.Parameter(torch.tensor(1.0))  # a tensor without dimensions

    def forward(self, x: Tensor) -> Tensor:
        inner = self.frozen(x)
        out: Tensor = inner + self.scale * self.up(torch.relu(self.down(inner)))
        return out


def adapted(folder: Path, kind: str) -> nn.Module:
    """A tiny llama with an adapter of that kind; every call gives the same values."""
    torch.manual_seed(3)
    if kind == "bottleneck":
        return Bottleneck()
    base: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if kind == "all":
        return base  # a full model
    if kind == "bias":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.endswith("norm.weight"))  # llama's only vectors
        return base
    both = ["q_proj", "v_proj"]
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=both),
        "dora": lambda: peft.LoraConfig(r=4, target_modules=both, use_dora=True),
        "rslora": lambda: peft.LoraConfig(r=4, target_modules=both, use_rslora=True),
        "head": lambda: peft.LoraConfig(r=4, target_modules=both, modules_to_save=["lm_head"]),
        "ia3": lambda: peft.IA3Config(
            target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "prompt": lambda: peft.PromptTuningConfig(
            num_virtual_tokens=4, task_type="CAUSAL_LM", num_attention_heads=1
        ),
        "adaption_prompt": lambda: peft.AdaptionPromptConfig(
            adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"
        ),
    }
    model: nn.Module = peft.get_peft_model(base, configs[kind]())
    return model


KINDS = ("dora", "ia3", "bottleneck", "all")
MORE_KINDS = ("lora", "rslora", "head", "prompt", "adaption_prompt", "bias")


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE_KINDS)]
)
def test_a_complete_graph_mixes_to_the_arithmetic_mean_whatever_trains(
    tmp_path: Path, model_folder: Callable[[str, str], Path], kind: str
) -> None:
    folder = model_folder("llama", "causal-lm")
    sites = Sites(tmp_path, NAMES, rounds=1, topology=COMPLETE)
    before: dict[str, dict[str, Tensor]] = {}

    def script(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with LOCK:
            model = adapted(folder, kind)
        with (peer := sites.peer(name)).joined(model):
            stirred(model, NAMES.index(name))
            before[name] = trained_values(model)
            mixed = peer.mix()
            assert mixed is not None and not peer.has_rounds_left and len(mixed.neighbours) == 2
            average = peer.average()
        if kind not in ("bottleneck", "all", "bias") and name == "east":
            with LOCK:
                assert_loads(model, average, folder, tmp_path / "consensus")
        return trained_values(model), average

    for own, average in sites.run(script).values():
        assert own.keys() == average.keys()
        for key, value in own.items():
            mean = torch.stack([before[name][key] for name in NAMES]).mean(dim=0)
            assert (value - mean).abs().max() < 1e-6 and (average[key] - mean).abs().max() < 1e-6


def assert_loads(model: Any, average: dict[str, Tensor], base: Path, folder: Path) -> None:
    """PEFT reads the saved average and computes what the model computes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in average:
                parameter.copy_(average[name])
    model.save_pretrained(folder)
    read = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), folder
    )
    tokens = torch.arange(6).unsqueeze(0)
    model.eval(), read.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, read(input_ids=tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_mixed_in_float32_and_keeps_its_own(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    sites = Sites(tmp_path, NAMES[:2], rounds=2, topology=COMPLETE)

    def script(name: str) -> tuple[Tensor, Tensor]:
        value = nn.Parameter(torch.zeros(64, 8, dtype=dtype))
        with (peer := sites.peer(name)).joined({"value": value}):
            for round in range(2):
                drawn = torch.Generator().manual_seed(10 * NAMES.index(name) + round)
                with torch.no_grad():
                    value.add_(torch.randn(64, 8, generator=drawn).to(dtype))
                before = value.detach().clone()
                peer.mix()
            return before, value.detach()

    told = sites.run(script)
    mean = torch.stack([before.double() for before, _ in told.values()]).mean(dim=0)
    for _, after in told.values():
        assert after.dtype == dtype
        step = torch.finfo(dtype).eps if dtype != torch.float64 else torch.finfo(torch.float32).eps
        assert ((after.double() - mean).abs() <= step * mean.abs() + 1e-6).all()


def test_an_exchange_that_runs_beside_the_training_keeps_the_mean(tmp_path: Path) -> None:
    """``wait=False``: each round's difference is added one round late."""
    rounds = 4
    sites = Sites(tmp_path, NAMES, rounds=rounds)
    steps = {
        name: [torch.full((5,), float(place + 3 * round)) for round in range(rounds)]
        for place, name in enumerate(NAMES)
    }

    def script(name: str) -> tuple[Tensor, Tensor]:
        value, results = nn.Parameter(torch.zeros(5)), []
        with (peer := sites.peer(name)).joined({"value": value}):
            for step in steps[name]:
                with torch.no_grad():
                    value.add_(step)
                results.append(peer.mix(wait=False))
                with torch.no_grad():
                    value.add_(0.5)  # trained while the exchange runs
            belief = peer.state_dict()["belief"]
            average = peer.average()["value"]
        way = sum(float((step + 0.5).norm()) for step in steps[name]) - 0.5 * 5**0.5
        assert belief["rounds"] == rounds and belief["way"] == pytest.approx(way)
        assert results[0] is None and [one.round for one in results[1:] if one] == [0, 1, 2]
        return value.detach(), average

    told = sites.run(script)
    walked = [torch.stack(own).sum(dim=0) + 0.5 * rounds for own in steps.values()]
    gone = torch.stack(walked).mean(dim=0)
    kept = torch.stack([value for value, _ in told.values()]).mean(dim=0)
    assert torch.allclose(kept, gone, atol=1e-5)
    assert len({tuple(average.tolist()) for _, average in told.values()}) == 1


def test_a_site_that_dies_goes_on_from_an_old_checkpoint_and_no_edge_is_lost(
    tmp_path: Path,
) -> None:
    """East dies after round 4 and goes on from its checkpoint of round 1: the sum over sites loses
    its local steps of rounds 2 to 4, and nothing else.
    """
    rounds = 6
    sites = Sites(tmp_path, NAMES, rounds=rounds, silence_s=30)

    def step(name: str, round: int) -> Tensor:
        drawn = torch.Generator().manual_seed(100 * NAMES.index(name) + round)
        return torch.randn(5, generator=drawn)

    def script(name: str) -> Tensor:
        value, checkpoint = nn.Parameter(torch.zeros(5)), None
        if name == "east":
            with (peer := sites.peer(name)).joined({"value": value}):
                for round in range(5):
                    with torch.no_grad():
                        value.add_(step(name, round))
                    peer.mix()
                    if round == 1:
                        checkpoint = (value.detach().clone(), peer.state_dict())
            assert checkpoint is not None
            value = nn.Parameter(checkpoint[0])
        peer = sites.peer(name)
        if checkpoint is not None:
            peer.load_state_dict(checkpoint[1])
        with peer.joined({"value": value}):
            while peer.has_rounds_left:
                round = peer.state_dict()["progress"]["rounds_done"]
                with torch.no_grad():
                    value.add_(step(name, round + (100 if checkpoint else 0)))
                peer.mix()
            peer.average()
        return value.detach()

    total = torch.stack([*sites.run(script).values()]).sum(dim=0)
    rounds_of = {name: range(rounds) for name in NAMES[1:]} | {"east": (0, 1, 102, 103, 104, 105)}
    steps = [step(name, round) for name, own in rounds_of.items() for round in own]
    came = torch.stack(steps).sum(dim=0)
    assert torch.allclose(total, came, atol=1e-5)
    sites.assert_agreed()


def test_messages_stay_until_a_checkpoint_is_said_to_be_on_disk(tmp_path: Path) -> None:
    sites = Sites(tmp_path, NAMES[:2], rounds=3)

    def script(name: str) -> None:
        value = nn.Parameter(torch.ones(2))
        with (peer := sites.peer(name)).joined({"value": value}):
            states = [(peer.mix(), peer.state_dict()) for _ in range(3)]
            sent = sorted((tmp_path / "state" / name / "sent").iterdir())
            assert len(sent) == 3
            peer.saved(states[1][1])
            left = {path.name[:12] for path in (tmp_path / "state" / name / "sent").iterdir()}
            assert left == {"round-000002"}
            peer.average()

    sites.run(script)
    lost = sites.peer("east")  # starts anew, and what it would need is gone
    with pytest.raises(RunError, match="give its state to load_state_dict"):
        enter(lost, {"value": nn.Parameter(torch.ones(2))})


def test_other_adapters_are_refused_by_the_first_tensor_that_differs(
    tmp_path: Path, model_folder: Callable[[str, str], Path]
) -> None:
    folder = model_folder("llama", "causal-lm")
    sites = Sites(tmp_path, NAMES[:2], rounds=1)

    def script(name: str) -> str:
        with LOCK:
            model = adapted(folder, "lora" if name == "east" else "ia3")
        with pytest.raises(NeighbourError) as refused, sites.peer(name).joined(model):
            pass
        return str(refused.value)

    for text in sites.run(script).values():
        assert "tensors (where they differ)" in text
        assert 'layers.0.self_attn.q_proj.lora_A.default.weight (4, 64)"] and 7 more at' in text
        assert "layers.0.mlp.down_proj.ia3_l.default (1, 128)" in text


def test_adapters_that_differ_only_in_their_scaling_are_refused(
    tmp_path: Path, model_folder: Callable[[str, str], Path]
) -> None:
    """The tensors look alike, and their average would be another model at each site."""
    folder = model_folder("llama", "causal-lm")
    sites = Sites(tmp_path, NAMES[:2], rounds=1)
    models = {}
    for name, alpha in zip(sites.names, (8, 16), strict=True):
        torch.manual_seed(3)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        lora = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"])
        models[name] = peft.get_peft_model(base, lora)

    def script(name: str) -> str:
        with pytest.raises(NeighbourError) as refused:
            enter(sites.peer(name), models[name])
        return str(refused.value)

    for text in sites.run(script).values():
        assert "adapter.default.lora_alpha is " in text and "the same config" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda value: value + 1, "the first value of value"),
        (lambda value: value, "agree.max_length"),
    ],
)
def test_other_values_and_other_agreements_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], says: str
) -> None:
    sites = Sites(tmp_path, NAMES[:2], rounds=1)

    def script(name: str) -> str:
        value = torch.ones(3)
        other = name == "north"
        agree = {"max_length": 128 if other and says.startswith("agree") else 64}
        with pytest.raises(NeighbourError) as refused:
            parameter = nn.Parameter(change(value) if other else value)
            enter(sites.peer(name, agree=agree), {"value": parameter})
        return str(refused.value)

    assert all(says in text for text in sites.run(script).values())


def test_wrong_use_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = Sites(tmp_path, NAMES[:2], rounds=1)
    files: dict[str, Any] = {
        "key": tmp_path / "north.key",
        "federation": tmp_path / "federation.yaml",
    }
    with pytest.raises(ConfigError, match="name is missing; give it to dlora.Peer, or set DLORA_N"):
        dlora.Peer(tmp_path / "peers.yaml", **files)
    monkeypatch.setenv("DLORA_NAME", "north")
    peer = dlora.Peer(tmp_path / "peers.yaml", **files)
    assert peer.name == "north"
    for use in (peer.mix, peer.average, peer.state_dict):
        with pytest.raises(RunError, match="takes no part now"):
            use()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no tensor requires a gradient"):
        enter(peer, frozen)
    with pytest.raises(RunError, match="taken part already"):
        enter(peer, nn.Linear(2, 2))
    with pytest.raises(RunError, match="before joined"):
        peer.load_state_dict({})
    sites.write(sites.section | {"rule": "ffa"})
    with pytest.raises(ConfigError, match="chooses between LoRA's A and B"):
        enter(sites.peer("north"), nn.Linear(2, 2))
    sites.write(sites.section | {"count": 2})
    with pytest.raises(ConfigError, match="count"):
        sites.peer("north")
    sites.write({**sites.section, "members": ["north", "nobody"]})
    with pytest.raises(IdentityError, match="nobody"):
        sites.peer("north")
    assert not (tmp_path / "state").exists() or not any((tmp_path / "state").iterdir())
