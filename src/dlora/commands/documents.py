"""A config in, a document out: as a table for people, or as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType

from dlora.events.log import to_json

if TYPE_CHECKING:
    from dlora.config.run import Config


def load(path: Path, overrides: list[str]) -> Config:
    """The config of a run."""
    from dlora.config.run import Config

    return Config.load(path, overrides)


def print_document(
    document: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], RenderableType]
) -> None:
    """The result of a command on standard output."""
    if as_json:
        typer.echo(to_json(document))
    else:
        # a label may be called [red]
        Console(markup=False, emoji=False).print(table(document), soft_wrap=True)
