"""The tasks and the scores, as tables: what a row is labelled with, which model and loss, and which
scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is different from one task to another."""

    model: str  # the class of transformers
    peft: str  # PEFT's TaskType
    # what a row has: the name of one class, a number, the names of several classes, the name of a
    # class for each word, or a text
    label: Literal["class", "number", "classes", "words", "text"]
    loss: Literal["cross-entropy", "squared-error", "binary-cross-entropy"]
    # for transformers, which would guess the loss from the labels' dtype
    problem_type: str | None = None
    shifted: bool = False  # position l of the model predicts the token l + 1
    # scores that a run can have; the first of those that it has decides which adapter is best
    scores: tuple[str, ...]

    def metric(
        self, has_options: bool, names: Sequence[str] | None, asked: Sequence[str] = ()
    ) -> str:
        """The score that decides which adapter is best. ``has_options``: rows have options, of
        which the likeliest is the answer. ``names``: of the labels. ``asked``: the scores of texts
        that the model writes.
        """
        missing: tuple[str, ...] = ()
        if self.label == "text":
            missing = tuple({"exact_match", "rouge_l"} - set(asked))
            missing += () if has_options else ("accuracy",)
        if self.label == "words" and not mark_spans(names or ()):
            missing = ("f1", "precision", "recall")
        return next(name for name in self.scores if name not in missing)

    @property
    def has_head(self) -> bool:
        """Whether the model gets a new head, with an output for each label."""
        return self.label != "text"

    @property
    def can_pool(self) -> bool:
        """Whether one linear on the mean over the tokens can be the head."""
        return self.model == "AutoModelForSequenceClassification"

    @property
    def names_labels(self) -> bool:
        """Whether rows have labels with names, which `data.labels` can list."""
        return self.label in ("class", "classes", "words")


def mark_spans(names: Sequence[str]) -> bool:
    """Whether labels of words say where a span begins and goes on: B-PER, I-PER, O."""
    return all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-") for name in names)


TASKS: dict[str, Task] = {
    "classification": Task(
        model="AutoModelForSequenceClassification",
        peft="SEQ_CLS",
        label="class",
        loss="cross-entropy",
        scores=("accuracy", "f1", "loss"),
    ),
    "regression": Task(
        model="AutoModelForSequenceClassification",
        peft="SEQ_CLS",
        label="number",
        loss="squared-error",
        problem_type="regression",
        scores=("pearson", "spearman", "loss"),
    ),
    "multi-label": Task(
        model="AutoModelForSequenceClassification",
        peft="SEQ_CLS",
        label="classes",
        loss="binary-cross-entropy",
        problem_type="multi_label_classification",
        scores=("micro_f1", "macro_f1", "loss"),
    ),
    "token-classification": Task(
        model="AutoModelForTokenClassification",
        peft="TOKEN_CLS",
        label="words",
        loss="cross-entropy",
        scores=("f1", "accuracy", "precision", "recall", "loss"),
    ),
    "causal-lm": Task(
        model="AutoModelForCausalLM",
        peft="CAUSAL_LM",
        label="text",
        loss="cross-entropy",
        shifted=True,
        scores=("exact_match", "rouge_l", "accuracy", "loss", "perplexity"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a score is read."""

    word: str
    higher_is_better: bool = True
    is_fraction: bool = False  # people read it in per cent


SCORES = {
    "accuracy": Score(word="accuracy", is_fraction=True),
    "f1": Score(word="f1", is_fraction=True),
    "exact_match": Score(word="exact match", is_fraction=True),
    "rouge_l": Score(word="ROUGE-L", is_fraction=True),
    "precision": Score(word="precision", is_fraction=True),
    "recall": Score(word="recall", is_fraction=True),
    "micro_f1": Score(word="micro f1", is_fraction=True),
    "macro_f1": Score(word="macro f1", is_fraction=True),
    "pearson": Score(word="Pearson correlation"),
    "spearman": Score(word="Spearman correlation"),
    "loss": Score(word="loss", higher_is_better=False),
    "perplexity": Score(word="perplexity", higher_is_better=False),
}


def score_of(name: str) -> Score:
    """How the score of that name is read; one that only another version knows is a plain number."""
    return SCORES.get(name) or Score(word=name)
