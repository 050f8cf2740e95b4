"""What `dlora plan` says of memory, seconds and ranks."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from dlora.config.run import Config
from dlora.costs import sizing
from dlora.lora.factors import num_parameters, stack
from dlora.programs.plan import plan
from dlora.run.grouping import bytes_of_activations
from dlora.run.prepare import prepare
from dlora.show.tables import plan_table


def text_of(costs: dict[str, Any]) -> str:
    file = io.StringIO()
    Console(file=file, width=200).print(plan_table(costs))
    return file.getvalue()


def test_memory_and_seconds_grow_with_the_peers(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**{"train.local_steps": 3})
    prepared = prepare(config)
    monkeypatch.setattr(sizing, "seconds_a_step", lambda prepared: 2.0)
    monkeypatch.setattr(sizing, "_seconds_to_add", lambda device, numbers: 1e-3)
    monkeypatch.setattr(sizing, "usable_memory", lambda prepared: 1e9)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    state = 16 * num_parameters(stack(prepared.trained, 1))
    monkeypatch.setattr("psutil.Process.memory_info", lambda process: SimpleNamespace(rss=10**6))
    each = 10**6 + bytes_of_activations(prepared)
    sizes = sizing.sizing(prepared)
    assert [*sizes["for_peers"]] == ["4", "10", "100", "1000", "10000"]
    for peers, size in sizes["for_peers"].items():
        assert size["rank_bytes"] == each + state * int(peers)
        assert size["round_s"] == pytest.approx(int(peers) * (3 * 2.0 + 3e-3))
    # at most one rank a peer and a core; none where what trains takes more than there is
    ranks = {peers: size["ranks"] for peers, size in sizes["for_peers"].items()}
    assert (ranks["4"], ranks["1000"], ranks["10000"]) == (4, 8, 0)


def test_a_step_is_measured_and_the_table_says_so(make_config: Callable[..., Config]) -> None:
    """Every kind of data, optimiser and dtype has steps that can be measured."""
    for more in ({}, {"train.optimizer": "sgd", "train.gradient_accumulation_steps": 2}):
        costs = plan(make_config(**more))
        assert 0 < costs["sizing"]["step_s"] < 5
        text = text_of(costs)
        assert "estimate for this machine" in text and "10,000" in text
    causal = plan(make_config("llama", "causal-lm", dtype="bfloat16"))
    assert causal["sizing"]["step_s"] > 0


def test_many_edges_are_counted_and_not_listed(make_config: Callable[..., Config]) -> None:
    costs = plan(make_config(**{"peers.count": 30}))
    assert len(costs["edges"]) == 30
    assert "and 10 more" in text_of(costs)


def test_other_numbers_of_peers_divide_the_same_rows(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With local epochs more peers take fewer steps each; who is drawn is at least one."""
    monkeypatch.setattr(sizing, "seconds_a_step", lambda prepared: 1.0)
    monkeypatch.setattr(sizing, "_seconds_to_add", lambda device, numbers: 0.0)
    keys = {"train.local_steps": None, "train.local_epochs": 1}
    for_peers = sizing.sizing(prepare(make_config(**keys)))["for_peers"]
    assert for_peers["4"]["round_s"] == 4 * 4 and for_peers["10"]["round_s"] == 10 * 2
    few = {"peers.participation": 0.01, "peers.topology": {"kind": "complete"}}
    with pytest.warns(UserWarning, match="only 0.0 edges mix in a round on average"):
        prepared = prepare(make_config(**few))
    some = sizing.sizing(prepared)["for_peers"]
    assert some["4"]["round_s"] == 2 and some["1000"]["round_s"] == 10 * 2
