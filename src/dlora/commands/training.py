"""Commands that train, or serve who trains: simulate, peer, cloud, device."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from dlora.commands.documents import load, print_document
from dlora.commands.options import AsJson, ConfigPath, FederationPath, KeyPath, ListenAt, Overrides
from dlora.errors import ConfigError
from dlora.show.progress import Progress
from dlora.show.tables import dry_run_table, served_table, summary_table
from dlora.stopping import Stop, resumable

# What takes time to import is imported by the command that needs it, after it has said that it is
# at work.

app = typer.Typer()


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
        loaded = load(config, set_)
        from dlora.data.first_look import look

        look(loaded, "dry-run", None)
        from dlora.programs import simulate as program

        plan = program.dry_run(loaded, listeners=[progress])
    print_document(plan, as_json, dry_run_table)


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
        from dlora.events.serving import CloudListener
        from dlora.programs.cloud import cloud as program

        hearing: list[CloudListener] = [view, stop.hear]
        summary = program(
            loaded,
            name=name,
            key=key,
            federation=federation,
            listen=listen,
            listeners=hearing,
            stop=stop,
        )
    print_document(summary, as_json, served_table)


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


def _train(program: str, config: Path, overrides: list[str], as_json: bool, **keys: Any) -> None:
    """Run ``dlora.programs.<program>`` until it is done or told to stop, and print what came of
    it.
    """
    progress = Progress(quiet=as_json)
    with resumable(progress) as stop, progress:
        loaded = load(config, overrides)
        from dlora.data.first_look import look  # without torch, which takes seconds to load

        look(loaded, program, keys.get("name"))
        run = getattr(importlib.import_module(f"dlora.programs.{program}"), program)
        summary = run(
            loaded, **keys, listeners=[progress, stop.hear], stop=stop, whole_process=True
        )
    print_document(summary, as_json, summary_table)
    if not as_json:
        typer.echo(f"report: {Path(loaded.output_dir, 'report.html')}")
