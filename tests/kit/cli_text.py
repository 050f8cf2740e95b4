"""What a command printed, as one reads it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from dlora.show.words import NBSP
from kit.call_cli import Outcome


def one_document(outcome: Outcome) -> Any:
    """What a command with --json says: one JSON document on one line, nothing else, no NaN in
    it.
    """
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert outcome.out.endswith("\n") and outcome.out.count("\n") == 1
    return json.loads(
        outcome.out, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON")
    )


def plain(text: str) -> str:
    """The text with spaces where no line may break."""
    return text.replace(NBSP, " ")


def words(text: str) -> str:
    """The text without the frames around it and the line breaks in it."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
