"""Which label each row has: a class, a number or several classes; rows without one, and values that
are none.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dlora.config.tasks import Task
from dlora.config.training import DataSection
from dlora.data.rows import PlacedRow, as_text, is_missing, require_column
from dlora.errors import ConfigError, DataError

# GLUE, SNLI and pandas write these
_OFTEN_NONE = ("-1", "-", "nan", "NaN", "NA", "N/A", "null", "NULL", "None", "?")
_MANY_CLASSES = 20
# [0, 1] and ['a'], and not [red]
_LIST = re.compile(r"""\s*\[\s*(?:[-+.'"0-9].*)?\]\s*""", re.DOTALL)


def leave_out(section: DataSection, placed: list[PlacedRow]) -> list[PlacedRow]:
    """The rows that have a label, where `data.no_label` says which stand for none. Raises DataError
    when none is left.
    """
    if section.no_label is None:
        return placed
    for columns, place in dict.fromkeys(
        (row.columns, row.place.rpartition(" row ")[0]) for row in placed
    ):
        if section.label not in columns:
            require_column([dict.fromkeys(columns)], section.label, place)
    kept = [row for row in placed if not _is_none(row.row.get(section.label), section.no_label)]
    if not kept:
        source = placed[0].place.rpartition(" row ")[0]
        raise DataError(
            f"{source}: no row has a label but those of data.no_label; bring rows that have one"
        )
    return kept


def _is_none(value: Any, no_label: Sequence[str]) -> bool:
    whole = isinstance(value, float) and value.is_integer()
    return is_missing(value) or value == "" or str(int(value) if whole else value) in no_label


def label_names(section: DataSection, task: Task, train: list[PlacedRow]) -> tuple[str, ...]:
    """The classes in order: `data.labels`, or those of the rows, as numbers if all are. Raises
    DataError or ConfigError.
    """
    if section.labels is not None:
        twice = sorted({name for name in section.labels if section.labels.count(name) > 1})
        if twice:
            raise ConfigError(f"data.labels names {twice[0]!r} twice; name each label once")
        return section.labels
    places: dict[str, str] = {}
    for placed in train:
        for name in row_labels(section, task, placed):
            places.setdefault(name, placed.place)
    numbers: dict[float, str] = {}
    for name in places:
        if (number := _number(name)) is not None and (
            other := numbers.setdefault(number, name)
        ) != name:
            raise DataError(
                f"{places[name]}: the label {name!r} and the {other!r} of {places[other]} are one"
                " number; write it alike"
            )
    if all(re.fullmatch(r"-?[0-9]+", name) for name in places):
        return tuple(sorted(places, key=lambda name: (int(name), name)))
    return tuple(sorted(places))


def doubts(section: DataSection, train: list[PlacedRow], names: Sequence[str]) -> list[str]:
    """Sentences for the user: what is odd about classes that were taken from the rows."""
    if section.labels is not None:
        return []
    counts = Counter(label_name(section, placed) for placed in train)
    said = []
    for name in _OFTEN_NONE:
        if counts[name]:
            said.append(
                f"{counts[name]:,} of {len(train):,} training rows have the label {name!r}, which"
                f" often means none: leave them out with data.no_label: ['{name}'], or say that it"
                " is a class by listing all in data.labels"
            )
    alike: dict[str, str] = {}
    for name in names:
        if (other := alike.setdefault(name.strip().casefold(), name)) != name:
            said.append(
                f"the labels {other!r} and {name!r} differ in blanks or capitals only, and are two"
                " classes"
            )
    if len(names) > max(_MANY_CLASSES, len(train) / 2):
        said.append(
            f"{len(train):,} training rows have {len(names):,} labels; is {section.label} the"
            " column of the label?"
        )
    return said


def label_indices(
    section: DataSection, task: Task, placed: list[PlacedRow], names: Sequence[str]
) -> list[list[int]]:
    """The labels of each row as indices in ``names``. Raises DataError naming the row that has a
    label which is none of them.
    """
    index = {name: number for number, name in enumerate(names)}
    indices = []
    for row in placed:
        named = row_labels(section, task, row)
        if name := next((name for name in named if name not in index), None):
            same = next(
                (other for other in names if _number(other) == _number(name) is not None), None
            )
            hint = "correct the row, or add the label to data.labels"
            if same is not None:
                hint = f"{name} and {same} are one number: write it alike in every file"
            elif name in _OFTEN_NONE:
                hint = f"if it means none, leave such rows out with data.no_label: ['{name}']"
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise DataError(
                f"{row.place}: the label {name!r} is not among those of training or data.labels:"
                f" {known}; {hint}"
            )
        indices.append([index[name] for name in named])
    return indices


def encoded_labels(
    section: DataSection, task: Task, placed: list[PlacedRow], names: Sequence[str] | None
) -> Sequence[int | float | tuple[float, ...]]:
    """The label of each row as an `Example` has it. Raises as `label_indices`, and where a row has
    no number although the task wants one.
    """
    if task.label == "number":
        return [_score(section, row) for row in placed]
    assert names is not None
    indices = label_indices(section, task, placed, names)
    if task.label == "class":
        return [index for [index] in indices]
    return [tuple(float(number in own) for number in range(len(names))) for own in indices]


def _score(section: DataSection, placed: PlacedRow) -> float:
    value = placed.row[section.label]
    number = _number(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or math.isinf(number):
        raise DataError(
            f"{placed.place}: {section.label} is {value!r}; expected a number. Names of classes"
            " want task: classification"
        )
    return float(number)


def row_labels(section: DataSection, task: Task, placed: PlacedRow) -> list[str]:
    """The labels of one row as text. Several labels are a list, or one text with commas between;
    the labels of words a list, or one text with blanks. Raises DataError where a value can be no
    label.
    """
    if task.label == "class":
        return [label_name(section, placed)]
    value, column, place = placed.row[section.label], section.label, placed.place
    listed = section.labels or ()
    return [
        listed[name]
        # a data set of the hub has numbers, and data.labels says what they mean
        if type(name) is int and name < len(listed) and str(name) not in listed and name >= 0
        else label_name(section, placed._replace(row=placed.row | {column: name}))
        for name in texts_in(value, column, place, "," if task.label == "classes" else None)
    ]


def texts_in(value: Any, column: str, place: str, between: str | None = None) -> list[Any]:
    """A list as it is, and a text as the list of its parts; ``between`` stands between the parts,
    None: blanks. Raises DataError for all else.
    """
    if isinstance(value, str) and not _LIST.fullmatch(value):
        return [part.strip() for part in value.split(between) if part.strip()]
    if not isinstance(value, list):
        raise DataError(
            f"{place}: {column} is {value!r}; expected a list such as ['red', 'green'], or a text"
            f" with {'blanks' if between is None else 'commas'} between"
        )
    return value


def label_name(section: DataSection, placed: PlacedRow) -> str:
    """The class of a row as text. Raises DataError where the value can be no class: a score, a
    list, an empty text.
    """
    value, column, place = placed.row[section.label], section.label, placed.place
    given = section.labels or ()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    written = isinstance(value, str) and value not in given and _LIST.fullmatch(value)
    if written or isinstance(value, list | dict):
        raise DataError(
            f"{place}: {column} is a list; several labels a row want task: multi-label, and one a"
            " word task: token-classification"
        )
    number = (
        value if isinstance(value, float) else _number(value) if isinstance(value, str) else None
    )
    if number is not None and not float(number).is_integer() and str(value) not in given:
        raise DataError(
            f"{place}: {column} is {value}; expected the name or number of a class. Scores want"
            " task: regression; classes of such names have to be listed in data.labels"
        )
    return str(value) if isinstance(value, float) else as_text(value, column, place)


def _number(name: str) -> float | None:
    return (
        float(name)
        if re.fullmatch(r"\s*[-+]?([0-9]{1,300}\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,2})?\s*", name)
        else None
    )
