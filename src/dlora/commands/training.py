"""Commands that train, or serve who trains: simulate, peer, local, cloud, device."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dlora.commands.documents import load, print_document
from dlora.commands.options import AsJson, ConfigPath, FederationPath, KeyPath, ListenAt, Overrides
from dlora.config.launchers import Launched, launched
from dlora.errors import ConfigError
from dlora.show.progress import Progress
from dlora.show.tables import dry_run_table, local_table, served_table, summary_table
from dlora.stopping import Stop, resumable

if TYPE_CHECKING:
    from dlora.config.run import Config

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
    In several processes: torchrun --standalone --nproc-per-node 4 -m dlora simulate run.yaml

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
def local(
    script: Annotated[
        str, typer.Argument(help="a training script that uses dlora.Peer", show_default=False)
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="its own arguments, after --", show_default=False)
    ] = None,
    peers: Annotated[int, typer.Option(min=1, help="how many peers to start")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="rounds that the script mixes")] = 10,
    topology: Annotated[str, typer.Option(help="the kind of graph")] = "ring",
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="another key of peers.yaml; repeatable"),
    ] = [],  # noqa: B006  # typer copies it
    folder: Annotated[
        Path | None,
        typer.Option(help="a new folder for keys, peers.yaml and state; else a temporary one"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start a training script as several peers on this machine, to try it before there are sites.

    Example: dlora local --peers 4 --rounds 5 --topology base-k train.py -- --epochs 1
    """
    from dlora.programs.local import local as program

    with Stop("stopping all peers", Progress(quiet=True)) as stop:
        stop.loading = False
        told = program(
            script,
            arguments or (),
            peers=peers,
            rounds=rounds,
            overrides=[f"topology.kind={topology}", *set_],
            folder=folder,
            say=partial(typer.echo, err=as_json),
            stop=stop,
        )
    print_document(told, as_json, local_table)
    codes = [one["exit_code"] for one in told["peers"].values()]
    if any(codes):  # that of a script that failed; those that were stopped have negative ones
        raise typer.Exit(next((code for code in codes if code > 0), 1))


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
    one_of = launched(os.environ) if program in ("simulate", "peer") else None
    shows = one_of is None or one_of.rank == 0
    progress = Progress(None if shows else Console(stderr=True, quiet=True), quiet=as_json)
    if not shows:
        warnings.showwarning = lambda *warning: None  # rank 0 shows it
    with resumable(progress) as stop, progress:
        loaded = _together(one_of, lambda: _looked_at(config, overrides, program, keys.get("name")))
        run = getattr(importlib.import_module(f"dlora.programs.{program}"), program)
        summary = run(
            loaded, **keys, listeners=[progress, stop.hear], stop=stop, whole_process=True
        )
    if not shows:
        return
    print_document(summary, as_json, summary_table)
    if not as_json:
        typer.echo(f"report: {Path(loaded.output_dir, 'report.html')}")


def _looked_at(path: Path, overrides: list[str], program: str, name: str | None) -> Config:
    from dlora.data.first_look import look  # without torch, which takes seconds to load

    loaded = load(path, overrides)
    look(loaded, program, name)
    return loaded


def _together(one_of: Launched | None, action: Callable[[], Config]) -> Config:
    """The result of ``action``. In a run of several processes, if it fails in one of them, that one
    tells why and all end.
    """
    if one_of is None:
        return action()
    from dlora.run.ranks import joined_ranks

    return joined_ranks().together(action)
