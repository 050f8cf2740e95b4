"""Law 2 over the architectures of transformers: stacked participants are separate runs, or they
train one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config
from dlora.config.training import TrainSection
from dlora.data.batches import collate
from dlora.errors import ModelError, RunError
from dlora.events.log import read_log
from dlora.lora.factors import Factors, stack
from dlora.lora.stacked import StackedModel
from dlora.run.grouping import find_grouping, why_one_at_a_time
from dlora.run.prepare import prepare
from dlora.run.trial import try_model
from dlora.train import Group, local_steps
from kit import families, tiny_models

pytestmark = pytest.mark.usefixtures("no_page")

BOUND = 1e-4  # on the updates of A, B and head together, as the laws have it
LEARNING_RATE = 0.1


def updates(model: StackedModel, task: str, groups: Sequence[range]) -> Factors:
    """What one step of SGD changes when participants go through the model in these groups, each
    from factors of its own.
    """
    num_participants = groups[-1].stop
    generator = torch.Generator().manual_seed(5)
    start = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in stack(model.initial, num_participants).items()
    }
    factors = {name: tensor.clone() for name, tensor in start.items()}
    section = TrainSection(optimizer="sgd", learning_rate=LEARNING_RATE)
    rows = families.rows(task, num_participants)
    for members in groups:
        own = {name: tensor[members.start : members.stop] for name, tensor in factors.items()}
        group = Group(own, members.start, members.stop, section)
        group.train_only(frozenset(factors))
        batch = collate([row for member in members for row in rows[member]], 0)
        local_steps(model, group, [[batch]], [LEARNING_RATE], section)
    return {name: factors[name] - start[name] for name in factors}


def law_2(model: StackedModel, task: str) -> float:
    """The largest |D - D'| / |D'| of a participant: four at once, and three and one, against one at
    a time.
    """
    alone = updates(model, task, [range(number, number + 1) for number in range(4)])
    worst = 0.0
    for groups in ([range(4)], [range(3), range(3, 4)]):
        together = updates(model, task, groups)
        for participant in range(4):
            difference, size = (
                torch.cat([update[participant].flatten() for update in kind.values()]).norm().item()
                for kind in ({name: together[name] - alone[name] for name in alone}, alone)
            )
            assert math.isfinite(difference), "the gradient is no number"
            worst = max(worst, difference / size)
    return worst


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "classification"),
        ("llama", "causal-lm"),
        ("gpt2", "classification"),
        ("mixtral", "causal-lm"),
    ],
)
def test_those_that_keep_participants_apart_train_together(family: str, task: str) -> None:
    model = families.tiny_model(family, task)
    assert why_one_at_a_time(model, families.rows(task, 3), 0) is None
    assert law_2(model, task) < BOUND


@pytest.mark.parametrize(
    ("family", "task", "reason"),
    [
        # a table without a batch dimension
        ("deberta-v2", "classification", "cannot take the rows of several at once"),
        ("deberta", "classification", "cannot take the rows of several at once"),
        # padding is mixed into the tokens
        ("fnet", "classification", "rows of one peer, or their length"),
        # the last token sees what pads it
        ("convbert", "classification", "rows of one peer, or their length"),
    ],
)
def test_those_that_mix_participants_train_one_at_a_time(
    family: str, task: str, reason: str
) -> None:
    model = families.tiny_model(family, task)
    said = why_one_at_a_time(model, families.rows(task, 3), 0)
    assert said is not None and reason in said
    # two participants, for whom DeBERTa's tables have a shape that fits
    assert why_one_at_a_time(model, families.rows(task, 2), 0) is not None


def test_batch_statistics_train_one_at_a_time() -> None:
    model = families.tiny_model("bert", "classification")
    model.network.bert.embeddings.LayerNorm = torch.nn.BatchNorm1d(32)
    assert "BatchNorm" in str(why_one_at_a_time(model, families.rows("classification", 3), 0))


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deberta")
    config = families.tiny_config("deberta-v2")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def test_a_simulation_of_deberta_is_as_many_runs(
    make_config: Callable[..., Config], deberta: Path, tmp_path: Path
) -> None:
    """Four peers of DeBERTa: each trains by itself, and the terminal, the log and the plan say
    so.
    """
    keys = {"model": str(deberta), "train.rounds": 1, "eval_every": 0}
    config = make_config(**keys, output_dir=str(tmp_path / "together"))
    with pytest.warns(
        UserWarning,
        match="peers train one at a time, not 4 at once: DebertaV2ForSequenceClassification",
    ):
        summary = dlora.simulate(config)
    assert summary["group_size"] == 1
    events = read_log(Path(config.output_dir, "log.jsonl"))
    assert "DebertaV2" in next(
        event["reason"] for event in events if event["event"] == "one-at-a-time"
    )
    alone = make_config(**keys, **{"peers.group_size": 1}, output_dir=str(tmp_path / "alone"))
    dlora.simulate(alone)
    file = "checkpoints/dec-lora/round-000001/factors.safetensors"
    expected = load_file(Path(alone.output_dir, file))
    for name, tensor in load_file(Path(config.output_dir, file)).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_that_was_mixed_does_not_go_on(
    make_config: Callable[..., Config], deberta: Path
) -> None:
    """A folder of an earlier version, which trained four peers of DeBERTa at once, is refused."""
    prepared = prepare(make_config(model=str(deberta)))
    with pytest.raises(RunError, match=r"trained 4 peers at once, but DebertaV2.* start anew"):
        find_grouping(prepared, 4)


# What the wide test finds otherwise than "together". An entry that is wrong, or missing, fails it.
ONE_AT_A_TIME = {
    "classification": {
        *(
            "canine",
            "convbert",
            "deberta",
            "deberta-v2",
            "fnet",
            "funnel",
            "longformer",
            "nystromformer",
            "t5gemma",
        ),
        *("t5gemma2", "xlnet", "yoso"),
    },
    "causal-lm": {"cpmant", "prophetnet", "xlnet"},
}
REFUSED = {  # by dlora, with what its message says
    ("causal-lm", "longcat_flash"): "reads the weight of classifier itself",
    ("causal-lm", "rwkv"): "changes its weights while it runs",
    ("causal-lm", "xlstm"): "the forward of xLSTMForCausalLM fails",
    ("classification", "ibert"): "all-linear matches no module",
    ("classification", "squeezebert"): "all-linear matches no module",
}
# not made, or not run, from defaults made small by tests/kit/families.py: they say nothing of dlora
NOT_SMALL = {
    "classification": {
        "cohere_compass_text",
        "deepseek_v2",
        "esmc",
        "jamba",
        "layoutlmv2",
        "layoutlmv3",
        "lilt",
        "mistral4",
        "perceiver",
        "reformer",
        "zamba",
        "zamba2",
    },
    "causal-lm": {
        "bailing_hybrid",
        "bamba",
        "blt",
        "cohere_compass_text",
        "dbrx",
        "deepseek_v2",
        "dots1",
        "dots3_note",
        "dots3_note_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4_assistant",
        "gemma4_unified_assistant",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2_moe",
        "mamba2",
        "musicgen",
        "musicgen_melody",
        "qwen4_exp",
        "qwen4_exp_text",
        "reformer",
        "zamba",
        "zamba2",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "family"),
    [
        (task, family)
        for task, known in families.NAMES.items()
        for family in known
        if family not in NOT_SMALL[task]
    ],
)
# an architecture's own, of what it will not have in transformers 6
@pytest.mark.filterwarnings("ignore")
def test_law_2_holds_for_every_architecture(task: str, family: str) -> None:
    """Four together, three and one, and each alone give the same updates; or the table says why
    not.
    """
    refusal = REFUSED.get((task, family))
    if refusal is not None:
        with pytest.raises(ModelError, match=refusal):
            try_model(families.tiny_model(family, task), families.rows(task, 1)[0], 0, family)
        return
    model = families.tiny_model(family, task)
    try_model(model, families.rows(task, 1)[0], 0, family)
    reason = why_one_at_a_time(model, families.rows(task, 3), 0)
    assert (reason is not None) == (family in ONE_AT_A_TIME[task]), reason
    assert reason is not None or law_2(model, task) < BOUND
