"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="the YAML of the run", show_default=False)
]


Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="override a key: --set train.rounds=50 (again for more)",
        show_default=False,
    ),
]


KeyPath = Annotated[
    Path, typer.Option(help="its key file, from: dlora identity new", show_default=False)
]


FederationPath = Annotated[
    Path,
    typer.Option(
        help="the members' certificates, from: dlora identity federation", show_default=False
    ),
]


ListenAt = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="accept links here; default: the port of this member's address"
    ),
]


AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON document for machines instead of tables")
]
