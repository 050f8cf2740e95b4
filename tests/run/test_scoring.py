"""Who is scored: all peers, none or a sample, several in one forward; a run that is stopped
meanwhile goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dlora
from dlora.config.run import Config
from dlora.errors import ConfigError, Interrupted
from dlora.evaluate import standard_errors
from dlora.events.kinds import Event
from dlora.events.log import read_log

pytestmark = pytest.mark.usefixtures("no_page")

MakeConfig = Callable[..., Config]


def run(
    make_config: MakeConfig, tmp_path: Path, name: str, family: str = "bert", **overrides: Any
) -> Any:
    """The summary of a short run in a folder of its own; the peers' numbers differ, for their rows
    do.
    """
    task = "causal-lm" if family == "llama" else "classification"
    return dlora.simulate(
        make_config(
            family, task, **{"train.rounds": 1, **overrides}, output_dir=str(tmp_path / name)
        )
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_several_in_one_forward_have_the_scores_of_each_alone(
    make_config: MakeConfig, tmp_path: Path, family: str
) -> None:
    # 16 rows: a forward of 48 has room for three participants, one of 16 for one
    together, alone = (
        run(make_config, tmp_path, f"{rows}", family, per_device_eval_batch_size=rows)["runs"][
            "dec-lora"
        ]
        for rows in (48, 16)
    )
    heard = [
        event for event in read_log(tmp_path / "48" / "log.jsonl") if event["event"] == "scores"
    ]
    assert len(heard[-1]["peers"]) == 4
    for name, scores in alone["peers"].items():
        assert together["peers"][name] == pytest.approx(scores, rel=1e-5)
    assert len({scores["loss"] for scores in alone["peers"].values()}) == 4
    assert together["consensus"] == alone["consensus"]


def test_a_sample_none_and_a_confusion_matrix(make_config: MakeConfig, tmp_path: Path) -> None:
    whole, sample, none = (
        run(make_config, tmp_path, str(which), eval_peers=which)["runs"]["dec-lora"]
        for which in ("all", 2, "none")
    )
    assert len(sample["peers"]) == 2 and len(whole["peers"]) == 4
    assert {name: whole["peers"][name] for name in sample["peers"]} == sample["peers"]
    losses = [scores["loss"] for scores in sample["peers"].values()]
    error = abs(losses[0] - losses[1]) / 2 * math.sqrt(1 - 2 / 4)
    assert (
        sample["peers_mean_error"]["loss"] == pytest.approx(error)
        and whole["peers_mean_error"] is None
    )
    assert (none["peers"], none["peers_mean"]) == ({}, None)
    assert whole["consensus"] == sample["consensus"] == none["consensus"]
    confusion = whole["confusion"]
    assert [sum(row) for row in confusion] == [8, 8]
    assert (confusion[0][0] + confusion[1][1]) / 16 == whole["consensus"]["accuracy"]
    assert whole["best"]["rounds_done"] == 1  # scores of nothing trained are no best ones


def test_a_sample_of_all_or_of_one_has_no_error() -> None:
    one = {"a": {"loss": 1.0}}
    assert (
        standard_errors(one, 3) is None and standard_errors({**one, "b": {"loss": 2.0}}, 2) is None
    )


def test_none_and_a_time_for_it_are_refused_together(make_config: MakeConfig) -> None:
    with pytest.raises(
        ConfigError, match="eval_peers none switches off what eval_peers_every 2 asks for"
    ):
        make_config(eval_peers="none", eval_peers_every=2)


@pytest.mark.parametrize("when", [0, 2, 4], ids=["before training", "in between", "at the end"])
def test_a_run_that_is_stopped_while_it_is_scored_goes_on(
    make_config: MakeConfig, tmp_path: Path, when: int
) -> None:
    """Field case 15: it ends before the next batch, and its log and scores are those of a run that
    nobody stopped.
    """
    config = {"train.rounds": 4, "train.local_steps": 1, "eval_peers_every": 2, "save_every": 3}
    whole = make_config(**config, output_dir=str(tmp_path / "whole"))
    expected = dlora.simulate(whole)["runs"]["dec-lora"]
    parts = make_config(**config, output_dir=str(tmp_path / "parts"))
    rounds = 0

    def stop(event: Event) -> None:
        nonlocal rounds
        rounds += event["event"] == "round"
        if (
            event["event"] == "evaluating"
            and rounds == when
            and event["what"] == ("average" if when == 0 else "peer-0 to peer-3")
        ):
            raise Interrupted("dec-lora stopped while it was scored")

    with pytest.raises(
        Interrupted,
        match=f"round {when} of 4 is finished and saved" if when else "nothing was trained yet",
    ):
        dlora.simulate(parts, listeners=[stop])
    resumed = dlora.simulate(parts, resume=True)["runs"]["dec-lora"]
    for key in ("consensus", "peers", "best", "confusion", "bytes_on_wire", "tokens"):
        assert resumed[key] == expected[key]
    stories = [
        [
            (event["event"], event.get("rounds_done", event.get("round")), event.get("consensus"))
            for event in read_log(tmp_path / folder / "log.jsonl")
            if event["event"] in ("round", "scores")
        ]
        for folder in ("whole", "parts")
    ]
    assert stories[0] == stories[1]


def test_what_all_runs_begin_with_is_scored_once(make_config: MakeConfig) -> None:
    scored = []
    config = make_config(
        **{"train.rounds": 1, "compare": ["pooled", "local"], "eval_peers": "none"}
    )
    dlora.simulate(
        config,
        listeners=[
            lambda event: (
                scored.append(event.get("run")) if event["event"] == "evaluating" else None
            )
        ],
    )
    # before the only batch, and after it
    assert scored == ["dec-lora"] * 4 + ["pooled"] * 2 + ["local"] * 2
    first = [
        event
        for event in read_log(Path(config.output_dir, "log.jsonl"))
        if event.get("rounds_done") == 0
    ]
    assert (
        len(first) == 3 and first[0]["consensus"] == first[1]["consensus"] == first[2]["consensus"]
    )
