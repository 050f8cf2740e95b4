"""Texts with a label, and words with a label each, as examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlora.config.tasks import Task
from dlora.config.training import DataSection
from dlora.data.formats import IGNORED, Example
from dlora.data.labels import encoded_labels, label_indices, texts_in
from dlora.data.rows import PlacedRow, as_text
from dlora.errors import ConfigError, DataError


def encode_texts(
    section: DataSection,
    task: Task,
    tokenizer: Any,
    placed: list[PlacedRow],
    names: Sequence[str] | None,
) -> list[Example]:
    """Texts, or pairs of them, with one label for each row. ``names``: of the labels, if they have
    names. Raises DataError or ConfigError.
    """
    columns = [section.text] if isinstance(section.text, str) else list(section.text)
    texts = [
        [as_text(row[column], column, place) for row, _, place, _ in placed] for column in columns
    ]
    encoded, cut = _tokenized(section, tokenizer, texts)
    types = encoded.get("token_type_ids") or [None] * len(placed)
    labels = encoded_labels(section, task, placed, names)
    return [
        Example(*fields)
        for fields in zip(encoded["input_ids"], labels, types, cut, cut, strict=True)
    ]


def encode_words(
    section: DataSection,
    task: Task,
    tokenizer: Any,
    placed: list[PlacedRow],
    names: Sequence[str],
) -> list[Example]:
    """Rows of words, with a label for each word, which the word's first token has; other tokens
    have none. Raises DataError or ConfigError.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"task token-classification needs a tokenizer that says where tokens stand in the text"
            f" (tokenizer.json), and {type(tokenizer).__name__} does not: take another model"
        )
    assert isinstance(section.text, str)  # config/run.py has checked this
    words = [texts_in(row.row[section.text], section.text, row.place) for row in placed]
    labels = label_indices(section, task, placed, names)
    for row, own, indices in zip(placed, words, labels, strict=True):
        if len(own) != len(indices) or not own:
            raise DataError(
                f"{row.place}: {section.text} has {len(own)} words and {section.label}"
                f" {len(indices)} labels; each word needs one"
            )
    joined = [" ".join(own) for own in words]
    encoded, cut = _tokenized(section, tokenizer, [joined], return_offsets_mapping=True)
    examples = []
    for number, ids in enumerate(encoded["input_ids"]):
        placed_labels = _at_first_tokens(
            words[number], labels[number], encoded["offset_mapping"][number]
        )
        types = encoded["token_type_ids"][number] if "token_type_ids" in encoded else None
        lost = len(words[number]) - sum(label != IGNORED for label in placed_labels)
        examples.append(Example(ids, placed_labels, types, cut[number], lost if cut[number] else 0))
    return examples


def _at_first_tokens(
    words: Sequence[str], labels: Sequence[int], spans: Sequence[tuple[int, int]]
) -> list[int]:
    """The label of each token; ``spans``: where the tokens stand in the words with blanks between.

    Special tokens stand nowhere.
    """
    placed, token, start = [IGNORED] * len(spans), 0, 0
    for word, label in zip(words, labels, strict=True):
        end = start + len(word)
        # a token may begin with the blank before its word
        first = next(
            (at for at in range(token, len(spans)) if spans[at][0] < end and spans[at][1] > start),
            None,
        )
        if first is not None:
            placed[first], token = label, first + 1
        start = end + 1
    return placed


def _tokenized(
    section: DataSection, tokenizer: Any, texts: list[list[str]], **more: Any
) -> tuple[Any, list[int]]:
    """Columns of texts as tokens, and how many tokens of each row `data.max_length` took."""
    specials = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if section.max_length <= specials:
        raise ConfigError(
            f"data.max_length {section.max_length}: the tokenizer adds {specials} tokens; make it"
            " larger"
        )
    # verbose: no warning about long texts, which are cut here
    encoded = tokenizer(*texts, verbose=False, **more)
    cut = [max(0, len(ids) - section.max_length) for ids in encoded["input_ids"]]
    # always, if only for one row: the tokenizer keeps the setting, and so it is in the manifest's
    # hash of it
    shortened = texts if any(cut) else [column[:1] for column in texts]
    truncated = tokenizer(*shortened, truncation=True, max_length=section.max_length, **more)
    return truncated if any(cut) else encoded, cut
