"""Commands that train nothing: plan, eval, export, report, config, topology."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlora.commands.documents import load, print_document
from dlora.commands.options import AsJson, ConfigPath, Overrides
from dlora.events.log import to_json
from dlora.files import write_atomically
from dlora.show.progress import Progress
from dlora.show.tables import plan_table, scores_table
from dlora.show.words import several_text
from dlora.stopping import Stop

# What takes time to import is imported by the command that needs it, after it has said that it is
# at work.

app = typer.Typer()


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
        loaded = load(config, set_)
        from dlora.programs.plan import plan as program

        costs = program(loaded, name)
    print_document(costs, as_json, plan_table)


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
    print_document(scores, as_json, scores_table)


@app.command()
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="the folder of a finished run", show_default=False)
    ],
    peer: Annotated[
        str | None,
        typer.Option(help="whose adapter; --merge: by default the average", show_default=False),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="the whole model, with the adapter in its weights")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="default: RUN/peers/PEER; --merge: RUN/merged/PEER or RUN/merged/consensus",
        ),
    ] = None,
) -> None:
    """Write one adapter of a run as a PEFT folder, or merged into the model.

    Without --merge it is the adapter of one peer of a simulation of many peers. With --merge it is
    a model that transformers and servers load without PEFT.

    Example: dlora export runs/mine --merge
    """
    progress = Progress()
    with Stop("stopping", progress), progress:
        from dlora.programs.export import export as program
        from dlora.programs.export import export_merged

        folder = export_merged(run, peer, output) if merge else program(run, peer, output)
    typer.echo(folder)


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
    from dlora.config.peers import TopologySection
    from dlora.config.reading import parse_section
    from dlora.decentralized.topology import build_topology
    from dlora.show.topology import as_figures, describe

    section = parse_section(TopologySection, {"kind": kind, "p": p, "seed": seed, "k": k})
    built = build_topology(section, weights, [f"peer-{index}" for index in range(peers)])  # type: ignore[arg-type]
    if output is not None:
        from dlora.show.drawing import graph

        edges = [built.edges(round) for round in range(built.period)]
        write_atomically(
            output,
            graph(
                edges,
                built.names,
                label=f"{kind} of {several_text(peers, 'peer')}",
                standalone=True,
            ),
        )
    if as_json:
        typer.echo(to_json({"kind": kind, "peers": peers, **as_figures(built)}))
    else:
        typer.echo(describe(built))
