"""dlora identity: keys, certificates and the federation file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Keys, certificates and the federation file: who is who, without a centre.",
)


@app.command()
def new(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="of this member, as the config names it", show_default=False
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            "--address", metavar="HOST:PORT", help="where others dial it; without: it only dials"
        ),
    ] = None,
    role: Annotated[
        str, typer.Option("--role", metavar="ROLE", help="peer, cloud or device")
    ] = "peer",
    folder: Annotated[
        Path, typer.Option("--folder", metavar="FOLDER", help="where to write the two files")
    ] = Path("."),
) -> None:
    """Make a key, which stays here, and a member file to send to the others.

    Example: dlora identity new clinic-a --address clinic-a.example.org:7000
    """
    from dlora.identity.keys import describe, new_identity

    key_path, member_path = new_identity(name, address, role, folder)  # type: ignore[arg-type]  # checked there
    typer.echo(
        f"{key_path}: the key; it stays here, nobody else may read it\n{member_path}: send it to"
        " the others"
    )
    typer.echo(describe(member_path))


@app.command()
def federation(
    members: Annotated[
        list[Path],
        typer.Argument(metavar="MEMBER...", help="the member files of all", show_default=False),
    ],
) -> None:
    """Print the federation file made of member files: whom to trust, the same file for every
    member.

    Example: dlora identity federation clinic-a.member.yaml clinic-b.member.yaml > federation.yaml
    """
    from dlora.identity.federation import federation_of

    made = federation_of(members)
    for apart in made.apart():
        warnings.warn(apart, stacklevel=1)
    typer.echo(made.dump(), nl=False)


@app.command()
def show(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="a key, member or federation file", show_default=False),
    ],
) -> None:
    """Print names, roles, addresses, validity and the fingerprints to read out over the phone;
    never a key.

    Example: dlora identity show federation.yaml
    """
    from dlora.identity.keys import describe

    typer.echo(describe(file))
