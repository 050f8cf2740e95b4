"""Every task goes from a config to scores, adapters and a page; its scores are those of scipy, of
torchmetrics or of a formula written out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import scipy.stats
import torch

import dlora
from dlora.config.run import Config
from dlora.config.tasks import SCORES, TASKS
from dlora.data.batches import collate
from dlora.data.formats import Example
from dlora.errors import ConfigError
from dlora.events.log import read_log
from dlora.run.prepare import prepare
from dlora.tasks.scores import scored

MakeConfig = Callable[..., Config]


def logits_in_peft(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the exported average, loaded by PEFT on the run's model: logits and labels."""
    base, _ = dlora.load_base(config.output_dir)
    model = peft.PeftModel.from_pretrained(base, Path(config.output_dir, "consensus")).eval()
    prepared = prepare(config)
    batch = collate(prepared.data.evaluation, prepared.pad_token_id)
    with torch.no_grad():
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        loss = model(**given, labels=batch.labels).loss
        printed = dlora.score(config.output_dir)["consensus"]["loss"]
        assert loss.item() == pytest.approx(printed, abs=1e-5)
        return model(**given).logits, batch.labels


def check_story(config: Config, metric: str) -> dict[str, float]:
    """What log, page and `dlora eval` say; returns the scores of the average."""
    assert metric in TASKS[config.task].scores
    log = read_log(Path(config.output_dir, "log.jsonl"))
    assert log[0]["event"] == "start" and log[0]["metric"] == metric
    page = Path(config.output_dir, "report.html").read_text()
    assert f"{SCORES[metric].word} of the averaged adapter" in page
    scores = dlora.score(config.output_dir)["consensus"]
    assert scores.keys() <= set(TASKS[config.task].scores)
    return scores


@pytest.mark.parametrize("pooling", [None, pytest.param("mean", marks=pytest.mark.slow)])
def test_regression(make_config: MakeConfig, pooling: str | None) -> None:
    config = make_config("bert", "regression", pooling=pooling)
    summary = dlora.simulate(config)
    scores = check_story(config, "pearson")
    assert summary["metric"] == "pearson"
    logits, labels = logits_in_peft(config)
    for name, of in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
        value = of(logits.squeeze(-1).numpy(), labels.numpy()).statistic
        assert scores[name] == pytest.approx(value, abs=1e-5)
        assert summary["runs"]["dec-lora"]["consensus"][name] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("pooling", [None, pytest.param("mean", marks=pytest.mark.slow)])
def test_multi_label(make_config: MakeConfig, pooling: str | None) -> None:
    config = make_config("bert", "multi-label", pooling=pooling)
    dlora.simulate(config)
    scores = check_story(config, "micro_f1")
    logits, labels = logits_in_peft(config)
    said, true = logits > 0, labels > 0

    def f1(said: torch.Tensor, true: torch.Tensor) -> float:
        named = (said.sum() + true.sum()).item()
        return 2 * (said & true).sum().item() / named if named else 0.0

    assert scores["micro_f1"] == pytest.approx(f1(said, true), abs=1e-6)
    each = [f1(said[:, number], true[:, number]) for number in range(3)]
    assert scores["macro_f1"] == pytest.approx(sum(each) / 3, abs=1e-6)


def test_predictions_that_are_all_alike_have_no_correlation() -> None:
    rows = [Example([1], float(number)) for number in range(4)]
    [alike] = {
        tuple(scored(TASKS["regression"], predicted, rows, ()).scores.values())
        for predicted in (torch.ones(4), torch.full((4,), float("nan")))
    }
    assert alike == (0.0, 0.0)
    assert scored(TASKS["regression"], torch.ones(1), rows[:1], ()).scores["pearson"] == 0.0


@pytest.mark.parametrize(
    ("kind", "task"),
    [*itertools.product(("dirichlet", "label-shares"), ("regression", "multi-label"))],
)
def test_rows_without_one_class_are_not_divided_by_it(
    make_config: MakeConfig, kind: str, task: str
) -> None:
    key = (
        {"concentration": 1.0}
        if kind == "dirichlet"
        else {"shares": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]}
    )
    with pytest.raises(ConfigError, match=f"partition {kind} needs one label a row; {task} has"):
        make_config("bert", task, **{"data.partition": {"kind": kind, **key}})
