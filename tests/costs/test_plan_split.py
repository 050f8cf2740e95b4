"""Law 8 with a cloud: what `dlora plan` says of the conversation is what the wire counts, for every
wire and head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

import dlora
from dlora.config.run import Config
from dlora.programs.plan import plan
from dlora.show.tables import plan_table
from kit.bottlenecks import BOTTLENECK

pytestmark = pytest.mark.usefixtures("no_page")

slow = pytest.mark.slow
CASES = [
    pytest.param("bert", "classification", {"pooling": "mean"}, {"wire": "float32"}, marks=slow),
    # what is handed off is long or short by the ranks
    (
        "bert",
        "classification",
        {
            "lora.r": 2,
            "lora.rank_pattern": {"0.*.query": 64, "intermediate.dense": 32},
            "schedule": {"kind": "random", "period": 1, "active_fraction": 0.3},
        },
        {"wire": "int8"},
    ),
    ("bert", "classification", {"eval_peers_every": 2}, {"wire": "int8", "pipeline": 3}),
    pytest.param(
        "roberta", "classification", {"lora.lora_dropout": 0.1}, {"wire": "bfloat16"}, marks=slow
    ),
    pytest.param(
        "llama",
        "causal-lm",
        {"eval_every": 1, "lora.target_modules": ["v_proj", "down_proj"]},
        {"wire": "bfloat16", "pipeline": 2},
        marks=slow,
    ),
    pytest.param(
        "opt",
        "classification",
        {"train.gradient_accumulation_steps": 2},
        {"wire": "int8"},
        marks=slow,
    ),
    ("bert", "classification", BOTTLENECK, {"wire": "bfloat16", "pipeline": 2}),
    pytest.param("gpt2", "causal-lm", BOTTLENECK, {"wire": "int8"}, marks=slow),
]


@pytest.mark.parametrize(("family", "task", "overrides", "split"), CASES)
def test_the_plan_is_what_is_counted(
    make_config: Callable[..., Config],
    family: str,
    task: str,
    overrides: dict[str, Any],
    split: dict[str, Any],
) -> None:
    config = make_config(
        family, task, **{"peers.count": 2, **overrides, "split": {"cloud": "cloud", **split}}
    )
    costs = plan(config)["cloud"]
    counted = dlora.simulate(config)["runs"]["dec-lora"]["cloud_bytes"]
    assert counted == pytest.approx(costs["cloud_bytes"], rel=0.02)
    assert costs["cloud_bytes"] == costs["down_bytes"] + costs["up_bytes"]
    parts = costs["adapter_bytes"] + costs["boundary_bytes"] + costs["scoring_bytes"]
    # the rest opened the conversation
    assert parts == pytest.approx(costs["cloud_bytes"], rel=0.05)


@pytest.mark.parametrize(("kind", "known"), [("kr", False), ("probe", False), ("random", True)])
def test_a_plan_of_what_scores_will_choose_says_about(
    make_config: Callable[..., Config], kind: str, known: bool
) -> None:
    config = make_config(
        **{
            "split": {"cloud": "cloud", "wire": "int8"},
            "schedule": {"kind": kind, "warmup_steps": 2},
        }
    )
    costs = plan(config)
    assert ("about" not in costs["cloud"]) is known
    console = Console(width=200)
    with console.capture() as said:
        console.print(plan_table(costs))
    assert ("in all about" not in said.get()) is known


def test_the_plan_is_the_formula(make_config: Callable[..., Config]) -> None:
    """Row A1 of the cost model: 2 (d_in + S d_out) numbers a token and unit, less d_in at the
    lowest.
    """
    config = make_config(
        "bert",
        **{"peers.count": 1, "train.rounds": 50, "split": {"cloud": "cloud", "wire": "float32"}},
    )
    costs = plan(config)["cloud"]
    width, wide, layers = 64, 128, 2
    # qkv, output, up, down
    units = [(width, 3 * width), (width, width), (width, wide), (wide, width)] * layers
    numbers = sum(2 * (inputs + outputs) for inputs, outputs in units) - width
    assert costs["groups"] == len(units)
    assert costs["round_trips_a_step"] == 2 * len(units) + 1
    assert costs["adapter_bytes_a_token"] == pytest.approx(4 * numbers, rel=0.02)
