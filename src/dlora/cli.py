"""The command line: it lists every command and tells a mistake in one line. It holds no logic."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dlora.commands import identities, looking, training
from dlora.config.launchers import refuse_ranks
from dlora.errors import DloraError, Interrupted
from dlora.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Fine-tune language models with LoRA on data that may not leave its owner.\n\nExit codes: 0"
        " done, 2 your mistake (the message says how to fix it), 3 the other side's, 4 interrupted"
        " and resumable."
    ),
)
app.add_typer(training.app)
app.add_typer(looking.app)
app.add_typer(identities.app, name="identity")


def main() -> None:
    """The console script: every DloraError is one line on stderr and its exit code."""
    warnings.showwarning = _warn  # type: ignore[assignment]  # the place in our code is left out
    try:
        if exit_code := app(standalone_mode=False):  # what a command's typer.Exit says
            sys.exit(exit_code)
    except DloraError as error:
        if error.told:
            sys.exit(error.exit_code)
        _fail(str(error), error.exit_code)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", Interrupted.exit_code)
    except Exception as error:
        # a mistake on the command line, as typer words it
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(_with_example(error), 2)
        raise


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dlora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """What stands before a command."""
    if context.invoked_subcommand not in ("simulate", "peer"):
        refuse_ranks(os.environ)


def _fail(message: str, exit_code: int) -> None:
    console = Console(stderr=True)
    for line in message.splitlines():  # several mistakes in one config are a line each
        head = "" if exit_code == Interrupted.exit_code else "[red]error:[/red] "
        console.print(Text.from_markup(head).append(line), soft_wrap=True)
    sys.exit(exit_code)


def _with_example(error: Any) -> str:
    """What is wrong on the command line, and a line that is right: the example in the command's
    help.
    """
    message = " ".join((error.format_message() or "no command given; see above").split())
    command = getattr(getattr(error, "ctx", None), "command", None)
    _, _, example = (getattr(command, "help", None) or "").partition("Example: ")
    if example:
        message = f"{message.rstrip('.')}; example: {' '.join(example.split())}"
        if any(argument.metavar == "CONFIG" for argument in command.params) and "CONFIG" in message:  # type: ignore[union-attr]
            message += " (dlora config > run.yaml writes a config to start from)"
    return message


def _warn(message: Warning | str, *_where: Any) -> None:
    """A warning as one line, without the place in our code that says nothing to a user."""
    Console(stderr=True).print(
        Text.from_markup("[yellow]warning:[/yellow] ").append(str(message)), soft_wrap=True
    )


if __name__ == "__main__":
    main()
