"""Every task goes from a config to scores, adapters and a page; its scores are those of scipy, of
torchmetrics or of a formula written out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from dlora.tasks.scores import scored, spans_of
from kit.bottlenecks import BOTTLENECK
from kit.cards import loaded_by_card
from kit.updates import KINDS

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


@pytest.mark.parametrize("family", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_token_classification(make_config: MakeConfig, family: str) -> None:
    config = make_config(family, "token-classification", **{"train.rounds": 8})
    dlora.simulate(config)
    scores = check_story(config, "f1")
    logits, labels = logits_in_peft(config)
    names = prepare(config).data.label_names or ()
    said, true = logits.argmax(-1), labels
    kept = true != -100
    accuracy = (said == true)[kept].double().mean().item()
    assert scores["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    rows = zip(said, true, strict=True)
    pairs = [([names[k] for k in s[t != -100]], [names[k] for k in t[t != -100]]) for s, t in rows]
    hits = sum(len(spans_of(s) & spans_of(t)) for s, t in pairs)
    found, due = (sum(len(spans_of(pair[side])) for pair in pairs) for side in (0, 1))
    assert scores["f1"] == pytest.approx(2 * hits / (found + due)) and due > 16


@pytest.mark.parametrize(
    ("task", "adapter"),
    [
        ("token-classification", BOTTLENECK),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [
                ("token-classification", {}),
                ("regression", BOTTLENECK),
                ("multi-label", {}),
                ("multi-label", KINDS["ia3"]),
                ("regression", {"lora": {}, "peft": {"bias": "all"}}),
            ]
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:peers train one at a time")
def test_the_code_of_a_card_gives_the_printed_loss(
    make_config: MakeConfig, task: str, adapter: dict[str, Any]
) -> None:
    config = make_config("bert", task, **{"train.rounds": 3, "eval_every": 0}, **adapter)
    printed = dlora.simulate(config)["runs"]["dec-lora"]["consensus"]["loss"]
    model, prepared = loaded_by_card(config, Path(config.output_dir, "consensus")), prepare(config)
    batch = collate(prepared.data.evaluation, prepared.pad_token_id)
    with torch.no_grad():
        found = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        )
    assert found.loss.item() == pytest.approx(printed, abs=1e-5)
    page = Path(config.output_dir, "report.html").read_text()
    assert ("PeftModel" in page) == (adapter != BOTTLENECK)


# (labels, their spans as seqeval 0.0.10's get_entities prints them, the end one further)
SPANS = [
    ("O B-A I-A O", {("A", 1, 3)}),
    ("I-A I-A O I-B", {("A", 0, 2), ("B", 3, 4)}),
    ("B-A B-A I-B I-B", {("A", 0, 1), ("A", 1, 2), ("B", 2, 4)}),
    ("B-A O I-A", {("A", 0, 1), ("A", 2, 3)}),
    ("S-A B-A I-A E-A I-A", {("A", 0, 1), ("A", 1, 4), ("A", 4, 5)}),
    ("S-A S-A E-A E-B O E-A", {("A", 0, 1), ("A", 1, 2), ("A", 2, 3), ("B", 3, 4), ("A", 5, 6)}),
    ("B-a-b I-a-b B-a-c", {("a-b", 0, 2), ("a-c", 2, 3)}),
    ("O O", set()),
]


@pytest.mark.parametrize(("labels", "spans"), SPANS)
def test_spans_are_those_of_seqeval(labels: str, spans: set[tuple[str, int, int]]) -> None:
    assert spans_of(labels.split()) == spans


def test_labels_that_mark_no_spans_have_an_accuracy_only() -> None:
    task, rows = TASKS["token-classification"], [Example([1, 2, 3], [-100, 0, 1])]
    predicted = torch.tensor([[0, 0, 0]])
    assert scored(task, predicted, rows, ("NOUN", "VERB")).scores == {"accuracy": 0.5}
    assert task.metric(False, ("NOUN", "VERB")) == "accuracy"
    marked = scored(task, predicted, rows, ("O", "B-X")).scores
    assert marked == {"accuracy": 0.5, "f1": 0.0, "precision": 0.0, "recall": 0.0}


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
