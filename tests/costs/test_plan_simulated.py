"""Law 8 without real peers: `dlora plan` and `--dry-run` say what a simulation will count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

import dlora
from dlora.config.run import Config
from dlora.programs.plan import plan
from dlora.programs.simulate import dry_run
from dlora.show.tables import dry_run_table, plan_table
from dlora.show.words import NBSP, bytes_text

pytestmark = pytest.mark.usefixtures("no_page")

slow = pytest.mark.slow
DRAWN = {"peers.count": 6, "peers.participation": 0.5, "peers.topology.kind": "complete"}


def printed(table: object) -> str:
    console = Console(width=300)
    with console.capture() as said:
        console.print(table)
    return said.get()


@pytest.mark.parametrize(
    "keys",
    [
        DRAWN,
        {"schedule": {"kind": "random", "active_fraction": 0.4, "period": 3}},
        pytest.param(DRAWN | {"schedule": {"kind": "random", "period": 1}}, marks=slow),
        pytest.param({"peers.topology.kind": "base-k", "peers.wire": "bfloat16"}, marks=slow),
        pytest.param({"peers.rule": "alternate", "peers.period": 2}, marks=slow),
        pytest.param({"peers.count": 1}, marks=slow),
    ],
)
def test_a_simulation_counts_what_was_said(
    make_config: Callable[..., Config], keys: dict[str, Any]
) -> None:
    config = make_config(**{"train.rounds": 5, "train.local_steps": 2, "eval_every": 0} | keys)
    costs, tried = plan(config), dry_run(config)
    counted = dlora.simulate(config)["runs"]["dec-lora"]["bytes_on_wire"]
    assert costs["bytes_simulated"] == tried["bytes_on_wire"] == counted
    assert costs["bytes_on_wire"] > counted or config.peers.count == 1
    if "schedule" not in keys and "peers.rule" not in keys:
        assert tried["messages_a_round"] * 5 * tried["message_bytes"] == counted
    if config.peers.count != 1:
        assert f"{bytes_text(counted)} in 5 rounds" in printed(dry_run_table(tried))
        assert f"rounds alone: {bytes_text(counted)} (" in printed(plan_table(costs))


@pytest.mark.slow
def test_where_scores_choose_it_is_the_most(make_config: Callable[..., Config]) -> None:
    kr = {"kind": "kr", "active_fraction": 0.4, "period": 3, "warmup_steps": 4}
    config = make_config(**DRAWN, **{"train.rounds": 8}, schedule=kr)
    tried = dry_run(config)
    counted = dlora.simulate(config)["runs"]["dec-lora"]["bytes_on_wire"]
    assert 0.5 * tried["bytes_on_wire"] < counted <= tried["bytes_on_wire"]
    said = printed(dry_run_table(tried)).replace(NBSP, " ")
    assert "messages; at most " in said
