"""What a user should know of the examples: how much was cut, what is scored on that was trained
on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dlora.config.training import DataSection
from dlora.data.formats import IGNORED, Example

# share of evaluation rows from which on it is said; short texts stand twice in honest data too
_LEAK = 0.05


def cut_counts(examples: Iterable[Example]) -> dict[str, Any]:
    """How many rows max_length cut: rows, cut_rows, and the share of what is learned that is gone,
    0 to 1.

    What is learned are the tokens in the loss, or those from which the label of a text is learned.
    """
    rows = cut_rows = learned = learned_cut = 0
    for example in examples:
        rows += 1
        cut_rows += example.num_cut > 0
        learned_cut += example.num_learned_cut
        kept = example.labels
        learned += (
            len(kept) - kept.count(IGNORED) if isinstance(kept, list) else len(example.input_ids)
        )
    total = learned + learned_cut
    return {"rows": rows, "cut_rows": cut_rows, "cut_share": learned_cut / total if total else 0.0}


def seen_share(train: Iterable[Example], evaluation: Sequence[Example]) -> float:
    """The share of evaluation examples, 0 to 1, whose tokens some training example has too."""
    seen = {hash(tuple(example.input_ids)) for example in train}
    return sum(hash(tuple(example.input_ids)) in seen for example in evaluation) / max(
        1, len(evaluation)
    )


def leaks(section: DataSection, seen: float) -> list[str]:
    """What to say about evaluation rows that are trained on: a sentence, or nothing."""
    same = sorted(_files(section.train) & _files(section.eval))
    if not same and seen < _LEAK:
        return []
    why = f"data.train and data.eval are one file, {same[0]}: " if same else ""
    return [
        f"{why}{100 * seen:.0f} % of the evaluation rows are in training too; scores say little"
        " about new data"
    ]


def _files(source: str | dict[str, str]) -> set[str]:
    return {
        str(Path(file).resolve())
        for file in (source.values() if isinstance(source, dict) else [source])
    }
