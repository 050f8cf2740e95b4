"""The doors: parse, call one function, print. No logic."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from dlora.errors import ConfigError, DloraError, Interrupted
from dlora.events.log import Listener, to_json
from dlora.files import write_atomically
from dlora.show.progress import Progress
from dlora.show.tables import cost_table, plan_table, scores_table, served_table, summary_table
from dlora.stopping import Stop, resumable
from dlora.version import __version__

if TYPE_CHECKING:
    from dlora.config.run import Config

# What takes time to import is imported by the command that needs it, after it has said that it is
# at work.

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


def main() -> None:
    """The console script: every DloraError is one line on stderr and its exit code."""
    warnings.showwarning = _warn  # type: ignore[assignment]  # the place in our code is left out
    try:
        app(standalone_mode=False)
    except DloraError as error:
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
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
def simulate(
    config: ConfigPath,
    set_: Overrides = [],  # noqa: B006  # typer copies it
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint in output_dir")
    ] = False,
    as_json: AsJson = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="check config, data and model; say what would run; write nothing"
        ),
    ] = False,
) -> None:
    """Dec-LoRA on one machine: n peers in one process, and the baselines they are compared with.

    Example: dlora simulate examples/sst2-ring.yaml --set peers.count=16 --set train.rounds=50
    """
    if dry_run and resume:
        raise ConfigError(
            "--dry-run and --resume: a dry run starts nothing and resumes nothing; give one of them"
        )
    if not dry_run:
        _train("simulate", config, set_, as_json, resume=resume)
        return
    progress = Progress(quiet=as_json)
    with Stop("stopping", progress), progress:
        loaded = _load(config, set_)
        from dlora.data.first_look import look

        look(loaded, "dry-run", None)
        from dlora.programs import simulate as program

        plan = program.dry_run(loaded, listeners=[progress])
    _print(plan, as_json, plan_table)


@app.command()
def peer(
    config: ConfigPath,
    name: Annotated[
        str, typer.Option(help="this member's name in peers.members", show_default=False)
    ],
    key: KeyPath,
    federation: FederationPath,
    listen: ListenAt = None,
    set_: Overrides = [],  # noqa: B006  # typer copies it
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last commit in output_dir")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Dec-LoRA between machines: one peer, beside its own data; start one at each member.

    Example: dlora peer run.yaml --name north --key north.key --federation federation.yaml
    """
    who = {"name": name, "key": key, "federation": federation, "listen": listen}
    _train("peer", config, set_, as_json, resume=resume, **who)


@app.command()
def cloud(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="the YAML of the cloud: its model", show_default=False
        ),
    ],
    name: Annotated[
        str, typer.Option(help="this cloud's name in the federation", show_default=False)
    ],
    key: KeyPath,
    federation: FederationPath,
    listen: ListenAt = None,
    set_: Overrides = [],  # noqa: B006  # typer copies it
    as_json: AsJson = False,
) -> None:
    """DLoRA, the cloud: run the frozen model for many devices; Ctrl-C stops it, and nothing of
    theirs is kept.

    Example: dlora cloud cloud.yaml --name hub --key hub.key --federation federation.yaml --set
    limits.max_devices=8
    """
    from dlora.show.cloud.table import CloudView

    answer = "stopping; devices dial again when the cloud is back"
    view = CloudView(quiet=as_json)
    with Stop(answer, view) as stop, view:
        from dlora.config.cloud import CloudConfig

        loaded = CloudConfig.load(config, set_)
        from dlora.programs.cloud import cloud as program

        hearing: list[Listener] = [view, stop.hear]
        summary = program(
            loaded,
            name=name,
            key=key,
            federation=federation,
            listen=listen,
            listeners=hearing,
            stop=stop,
        )
    _print(summary, as_json, served_table)


@app.command()
def device(
    config: ConfigPath,
    name: Annotated[
        str, typer.Option(help="this device's name in the federation", show_default=False)
    ],
    key: KeyPath,
    federation: FederationPath,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="neighbours dial here; default: the port of its address, if any",
        ),
    ] = None,
    set_: Overrides = [],  # noqa: B006  # typer copies it
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint in output_dir")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """DLoRA, the device: text, labels, factors and optimiser stay here; the frozen model of
    split.cloud runs there.

    With peers.members a peer too: it agrees with those devices, and the cloud has no part in that.

    Example: dlora device run.yaml --name phone --key phone.key --federation federation.yaml --set
    split.wire=int8
    """
    who = {"name": name, "key": key, "federation": federation, "listen": listen}
    _train("device", config, set_, as_json, resume=resume, **who)


@app.command()
def plan(
    config: ConfigPath,
    name: Annotated[
        str | None, typer.Option(help="the member whose data are at hand; default: all data are")
    ] = None,
    set_: Overrides = [],  # noqa: B006  # typer copies it
    as_json: AsJson = False,
) -> None:
    """What a run will cost before it runs: bytes over each edge, time on slow lines, memory.

    Example: dlora plan run.yaml --name north --set peers.wire=bfloat16
    """
    progress = Progress(quiet=as_json)
    with Stop("stopping", progress), progress:
        loaded = _load(config, set_)
        from dlora.programs.plan import plan as program

        costs = program(loaded, name)
    _print(costs, as_json, cost_table)


@app.command(name="eval")
def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="the folder of a finished run", show_default=False)
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE", help="score on these rows instead of the run's"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a run's adapters again, the average and each peer's own.

    Example: dlora eval runs/sst2-ring --data more-reviews.tsv
    """
    progress = Progress(quiet=as_json)
    with Stop("stopping", progress), progress:
        from dlora.programs.score import score

        scores = score(run, data, listeners=[progress])
    _print(scores, as_json, scores_table)


@app.command()
def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="the folder of a run, finished or not", show_default=False
        ),
    ],
) -> None:
    """Write RUN/report.html anew from its log.

    Example: dlora report runs/sst2-ring
    """
    from dlora.show.report.write import write_report

    typer.echo(write_report(run))


@app.command(name="config")
def print_config(
    for_cloud: Annotated[
        bool, typer.Option("--cloud", help="the keys of a cloud instead of a run's")
    ] = False,
    as_schema: Annotated[
        bool, typer.Option("--schema", help="the JSON Schema of the keys, for editors")
    ] = False,
) -> None:
    """Print a config with every key, its default and its meaning; it loads as it is.

    Example: dlora config > run.yaml
    """
    from dlora.config.cloud import CloudConfig
    from dlora.config.example import example, schema
    from dlora.config.run import Config

    typer.echo((schema if as_schema else example)(CloudConfig if for_cloud else Config), nl=False)


@app.command()
def topology(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="ring, complete, erdos-renyi, exponential, hypercube, base-k",
            show_default=False,
        ),
    ],
    peers: Annotated[int, typer.Option("--peers", "-n", min=1, help="how many")] = 8,
    p: Annotated[float | None, typer.Option(help="erdos-renyi: probability of an edge")] = None,
    seed: Annotated[
        int | None, typer.Option(help="erdos-renyi: seed of the graph (default 0)")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("-k", min=1, help="base-k: neighbours a round, at most (default 1)"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="metropolis or laplacian; null: what the topology takes")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="draw the graph into this .svg")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Who talks to whom: neighbours, spectral gap, rounds and messages to agree.

    Example: dlora topology base-k --peers 10 -o base-k.svg
    """
    from dlora.config.reading import parse_section
    from dlora.config.run import TopologySection
    from dlora.decentralized.topology import build_topology
    from dlora.show.topology import as_figures, describe

    section = parse_section(TopologySection, {"kind": kind, "p": p, "seed": seed, "k": k})
    built = build_topology(section, weights, [f"peer-{index}" for index in range(peers)])  # type: ignore[arg-type]
    if output is not None:
        from dlora.show.drawing import graph

        edges = [built.edges(round) for round in range(built.period)]
        write_atomically(
            output, graph(edges, built.names, label=f"{kind} of {peers} peers", standalone=True)
        )
    if as_json:
        typer.echo(to_json({"kind": kind, "peers": peers, **as_figures(built)}))
    else:
        typer.echo(describe(built))


identities = typer.Typer(
    no_args_is_help=True,
    help="Keys, certificates and the federation file: who is who, without a centre.",
)
app.add_typer(identities, name="identity")


@identities.command()
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


@identities.command()
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


@identities.command()
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


def _load(path: Path, overrides: list[str]) -> Config:
    """The config of a run."""
    from dlora.config.run import Config

    return Config.load(path, overrides)


def _train(program: str, config: Path, overrides: list[str], as_json: bool, **keys: Any) -> None:
    """Run ``dlora.programs.<program>`` until it is done or told to stop, and print what came of
    it.
    """
    progress = Progress(quiet=as_json)
    with resumable(progress) as stop, progress:
        loaded = _load(config, overrides)
        from dlora.data.first_look import look  # without torch, which takes seconds to load

        look(loaded, program, keys.get("name"))
        run = getattr(importlib.import_module(f"dlora.programs.{program}"), program)
        summary = run(
            loaded, **keys, listeners=[progress, stop.hear], stop=stop, whole_process=True
        )
    _print(summary, as_json, summary_table)
    if not as_json:
        typer.echo(f"report: {Path(loaded.output_dir, 'report.html')}")


def _print(
    document: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], RenderableType]
) -> None:
    if as_json:
        typer.echo(to_json(document))
    else:
        # a label may be called [red]
        Console(markup=False, emoji=False).print(table(document), soft_wrap=True)


if __name__ == "__main__":
    main()
