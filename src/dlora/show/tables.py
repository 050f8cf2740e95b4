"""What commands print for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from dlora.show.words import (
    bytes_text,
    count_text,
    error_text,
    percent_text,
    score_text,
    seconds_text,
    several_text,
)

MOST_EDGES = 20  # in a table; --json has all


def local_table(told: dict[str, Any]) -> Group:
    """What each peer of a script has mixed on this machine."""
    table = Table("peer", "exit code", "rounds", "edges mixed", "sent and received", "waited")
    table.box = None
    for name, one in told["peers"].items():
        table.add_row(
            name,
            str(one["exit_code"]) if one["exit_code"] >= 0 else "stopped",
            str(one["rounds"]),
            str(one["edges"]),
            bytes_text(one["num_bytes"]),
            seconds_text(one["wait_s"]),
        )
    hint = "no process has mixed: the script must use dlora.Peer or dlora.PeerCallback"
    mixed = any(one["rounds"] for one in told["peers"].values())
    return Group(table) if mixed else Group(table, hint)


def summary_table(summary: dict[str, Any]) -> Group:
    """A finished run: each of its runs' scores and bytes, then where all of the time went."""
    metric = "perplexity" if summary["metric"] == "loss" else summary["metric"]
    split = any("cloud_bytes" in run for run in summary["runs"].values())
    wires = [
        *(["on wire"] if len(summary["peers"]) > 1 else []),
        *(["with the cloud"] if split else []),
    ]
    table = Table(
        "run",
        f"{metric}: average",
        "peers' own",
        "best (rounds)",
        *(wires or ["on wire"]),
        box=None,
    )
    for name, run in summary["runs"].items():
        moved = {"on wire": run["bytes_on_wire"], "with the cloud": run.get("cloud_bytes")}
        scores = [
            score_text((run[of] or {}).get(metric), metric)
            for of in ("consensus", "peers_mean", "best")
        ]
        scores[1] += error_text((run.get("peers_mean_error") or {}).get(metric), metric)
        scores[-1] += f" ({run['best']['rounds_done']})"
        if run.get("consensus_peers", len(summary["peers"])) < len(summary["peers"]):
            scores[0] += f" ({run['consensus_peers']} of {len(summary['peers'])})"
        table.add_row(name, *scores, *(bytes_text(moved[wire]) for wire in wires or ["on wire"]))
    edges = [edge for run in summary["runs"].values() for edge in run.get("edges", {}).items()]
    left_out = (
        [_edge_table(edges)]
        if any(edge["left_out"] or edge["in_doubt"] for _, edge in edges)
        else []
    )
    return Group(table, *left_out, *([_time_table(summary)] if summary.get("spent_s") else []))


def _edge_table(edges: list[tuple[str, dict[str, int]]]) -> Table:
    """The neighbours of a real peer with whom not every round was mixed."""
    table = Table("neighbour", "rounds mixed", "left out", "in doubt", box=None)
    for name, edge in edges:
        table.add_row(name, *(f"{edge[of]:,}" for of in ("mixed", "left_out", "in_doubt")))
    return table


def _time_table(summary: dict[str, Any]) -> Table:
    """A column for each run, and one for the whole command, with the time that belongs to no
    run.
    """
    whole, runs = summary["spent_s"], summary["runs"]
    table = Table("time", *runs, "all", box=None)
    for kind in whole:
        own = [run.get("spent_s", {}) for run in runs.values()]
        parts = [sum(spent.values()) if kind == "in_all" else spent.get(kind) for spent in own]
        cells = [
            "" if seconds is None else seconds_text(seconds) for seconds in (*parts, whole[kind])
        ]
        table.add_row({"start_up": "start-up", "in_all": "in all"}.get(kind, kind), *cells)
    return table


def scores_table(scores: dict[str, Any]) -> Table:
    """Adapters and their scores."""
    metrics = list(next(iter(scores.values())))
    table = Table("adapter", *metrics, box=None)
    for name, values in scores.items():
        table.add_row(name, *(score_text(values[metric], metric) for metric in metrics))
    return table


def dry_run_table(plan: dict[str, Any]) -> Group:
    """What a dry run found."""
    table = Table("peer", "rows", "local steps a round", "labels", box=None)
    for peer, steps in zip(plan["peers"], plan["local_steps"], strict=True):
        labels = ", ".join(f"{label} {count}" for label, count in (peer["labels"] or {}).items())
        table.add_row(peer["name"], str(peer["rows"]), str(steps), labels)
    bound = "at most " if plan.get("at_most") else ""
    agreement = [
        (
            f"{plan['trainable_parameters']:,} trained numbers a peer,"
            f" {several_text(plan['group_size'], 'peer')} at once"
        ),
        (
            f"a message with all that trains is {bytes_text(plan['message_bytes'])}, a round"
            f" {count_text(plan['messages_a_round'])} messages; {bound}"
            f"{bytes_text(plan['bytes_on_wire'])} in {several_text(plan['rounds'], 'round')};"
            f" spectral gap {plan['spectral_gap']:.3f}"
        ),
    ]
    if len(plan["peers"]) == 1:
        agreement = [f"{plan['trainable_parameters']:,} trained numbers, one participant"]
    if first := plan.get("schedule"):
        agreement.append(
            f"schedule {first['kind']}: {several_text(first['units'], 'unit')}; {first['active']}"
            " of them active in the first step, with"
            f" {percent_text(first['adapter_fraction'])} of the adapter's traffic"
        )
    if "stands" in plan:
        agreement.append(plan["stands"])
    cut = [
        _cut_text(what, plan["data"][key])
        for what, key in (("training", "train"), ("evaluation", "eval"))
    ]
    return Group(
        f"would run {', '.join(plan['runs'])} on {plan['model']}",
        table,
        *filter(None, cut),
        *agreement,
    )


def _cut_text(what: str, facts: dict[str, Any]) -> str:
    """What data.max_length takes from the rows; "" where it takes nothing."""
    if not facts["cut_rows"]:
        return ""
    share = percent_text(facts["cut_share"])
    return (
        f"data.max_length cuts {facts['cut_rows']:,} of {facts['rows']:,} {what} rows: {share} of"
        " what is learned is gone"
    )


def plan_table(costs: dict[str, Any]) -> Group:
    """What a run will cost: bytes over each edge, time, memory."""
    edges = Table("edge", "on wire", box=None)
    for edge, count in list(costs["edges"].items())[:MOST_EDGES]:
        edges.add_row(edge, bytes_text(count))
    if (more := len(costs["edges"]) - MOST_EDGES) > 0:
        edges.add_row(f"and {more:,} more", "")
    lines = ", ".join(
        f"{seconds_text(seconds)} at {line}"
        for line, seconds in costs["seconds_on_the_line"].items()
    )
    bound = "at most " if costs.get("at_most") else ""  # of the edges too
    between: list[Any] = [
        (
            f"{several_text(costs['peers'], 'peer')}, {several_text(costs['rounds'], 'round')}; a"
            f" message with all that trains is {bytes_text(costs['message_bytes'])}"
        ),
        edges,
        (
            f"{bound}{bytes_text(costs['bytes_a_round'])} a round,"
            f" {bytes_text(costs['bytes_on_wire'])} in all, each byte counted once"
        ),
        *(
            [
                f"a simulation counts the messages of its rounds alone: {bound}"
                f"{bytes_text(costs['bytes_simulated'])} (real peers also send frames, and"
                " messages for the last average)"
            ]
            if "bytes_simulated" in costs
            else []
        ),
        f"the busiest peer moves {bytes_text(costs['bytes_of_busiest_peer'])}: {lines}",
    ]
    return Group(
        *(between if costs["edges"] else []),
        *(_with_cloud(costs["cloud"]) if "cloud" in costs else []),
        f"memory: {bytes_text(costs['frozen_bytes'])} frozen, {bytes_text(costs['trained_bytes'])}"
        " for what trains, and activations",
        *(_sizing(costs["sizing"], costs["rounds"]) if "sizing" in costs else []),
    )


def _sizing(sizes: dict[str, Any], rounds: int) -> list[Any]:
    """A simulation on this machine, with the run's number of peers and with others."""
    whole = several_text(rounds, "round")
    # of a real peer only itself, which needs no ranks
    many = all("ranks" in size for size in sizes["for_peers"].values())
    table = Table(*["peers"] * many, "memory", "a round", whole, *["ranks"] * many, box=None)
    for peers, size in sizes["for_peers"].items():
        seconds = seconds_text(size["round_s"]), seconds_text(rounds * size["round_s"])
        cells = [bytes_text(size["rank_bytes"]), *seconds]
        if many:
            most = size["ranks"]
            ranks = f"1 to {most}" if most > 1 else str(most or "none fits")
            cells = [f"{int(peers):,}", *cells, ranks]
        table.add_row(*cells)
    return [
        (
            "\nestimate for this machine: a local step of one peer took"
            f" {1e3 * sizes['step_s']:,.0f} ms, and its activations"
            f" {bytes_text(sizes['activation_bytes'])}; time for scores comes on top"
        ),
        table,
        (
            "memory and seconds are those of one process"
            + ("; ranks: the --nproc-per-node that fits (docs/cluster.md)" if many else "")
        ),
    ]


def _with_cloud(costs: dict[str, Any]) -> list[str]:
    """The conversation with the cloud."""
    about = "about " if costs.get("about") else ""
    lines = ", ".join(
        f"{seconds_text(seconds)} at {line}"
        for line, seconds in costs["seconds_on_the_line"].items()
    )
    return [
        (
            f"with the cloud, {costs['wire']}: {several_text(costs['steps'], 'step')} of"
            f" {several_text(costs['groups'], 'unit')}, {costs['tokens']:,} tokens"
        ),
        (
            f"a step moves {about}{bytes_text(costs['bytes_a_step'])} in"
            f" {count_text(costs['round_trips_a_step'])} round trips; a token"
            f" {bytes_text(costs['adapter_bytes_a_token'])} for the adapter"
        ),
        (
            f"in all {about}{bytes_text(costs['down_bytes'])} down, {bytes_text(costs['up_bytes'])}"
            f" up: adapter {bytes_text(costs['adapter_bytes'])}, boundary"
            f" {bytes_text(costs['boundary_bytes'])}, scoring {bytes_text(costs['scoring_bytes'])}"
        ),
        f"the slower way takes {about}{lines}",
    ]


def served_table(summary: dict[str, Any]) -> Group:
    """What a cloud did for whom."""
    table = Table("device", "links", "tokens", "steps", "down", "up", "failures", box=None)
    for device, served in summary["devices"].items():
        numbers = [f"{served[key]:,}" for key in ("links", "tokens", "steps")]
        failures = ", ".join(f"{why} {count}" for why, count in served["failures"].items())
        table.add_row(
            device,
            *numbers,
            bytes_text(served["sent_bytes"]),
            bytes_text(served["received_bytes"]),
            failures,
        )
    served_s = f"served {summary['model']} for {seconds_text(summary['seconds'])}"
    return Group(
        f"{served_s}, {summary['refused_links']} links refused",
        *([table] if summary["devices"] else []),
    )
