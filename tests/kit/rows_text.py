"""Rows as text."""

from __future__ import annotations

import json

ROWS = [
    json.dumps({"text": f"the film was {['bad', 'good'][index % 2]}", "label": index % 2})
    for index in range(8)
]


def rows_with(number: int, row: str) -> str:
    return "\n".join([*ROWS[: number - 1], row, *ROWS[number:]])
