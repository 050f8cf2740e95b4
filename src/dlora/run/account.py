"""What a run says about itself: in the first event of its log, and in summary.json at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlora.decentralized.topology import spectral_gap
from dlora.events.kinds import Start
from dlora.events.log import to_json
from dlora.files import write_atomically
from dlora.lora.factors import num_parameters, stack
from dlora.run.folder import RunFolder
from dlora.run.manifest import manifest_hash
from dlora.run.prepare import Prepared
from dlora.run.spent import Stopwatch
from dlora.show.report.write import write_report
from dlora.version import __version__

Summary = dict[str, Any]


def introduction(
    prepared: Prepared, runs: Sequence[str], group_size: int, own: str | None = None
) -> Start:
    """The facts about a run before it starts.

    ``own``: the only participant whose data are here; None: all participants' data are here.
    """
    data, topology = prepared.data, prepared.topology
    labels = data.label_counts or {}
    here = {name: len(rows) for name, rows in data.peers.items()}
    said = Start(
        event="start",
        version=__version__,
        model=prepared.config.model,
        task=prepared.config.task,
        metric=prepared.metric,
        runs=list(runs),
        data=data.facts,
        warnings=list(data.warnings),
        peers=[
            {"name": name, "rows": here.get(name), "labels": labels.get(name)}
            for name in topology.names
        ],
        edges=[topology.edges(round) for round in range(topology.period)],
        spectral_gap=spectral_gap(topology),
        trainable_parameters=num_parameters(stack(prepared.trained, 1)),
        message_bytes=prepared.message_bytes,
        group_size=group_size,
    )
    if own is not None:
        said["own"] = own
    if prepared.config.peers.participation < 1:
        said["participation"] = prepared.config.peers.participation
    if prepared.processes.are_several:
        said["ranks"] = prepared.processes.size
    if prepared.config.split is not None:
        said["split"] = prepared.config.split.model_dump(mode="json")
    return said


def summary(
    prepared: Prepared,
    results: Mapping[str, Summary],
    manifest: dict[str, Any],
    group_size: int,
    seconds: float,
    own: str | None = None,
) -> Summary:
    """The content of summary.json; ``manifest`` is what all participants agreed on."""
    said = introduction(prepared, list(results), group_size, own)
    return {
        **{key: said[key] for key in ("version", "model")},
        "manifest": manifest_hash(manifest),
        "task": prepared.config.task,
        "metric": said["metric"],
        **{key: said[key] for key in ("own", "split", "participation", "ranks") if key in said},
        "seconds": seconds,
        **{
            key: said[key]
            for key in ("trainable_parameters", "message_bytes", "group_size", "spectral_gap")
        },
        **({"warnings": said["warnings"]} if said["warnings"] else {}),
        **({"label_names": list(names)} if (names := prepared.data.label_names) else {}),
        "peers": {
            peer["name"]: {"rows": peer["rows"], "labels": peer["labels"]} for peer in said["peers"]
        },
        "runs": dict(results),
    }


def conclude(folder: RunFolder, summed: Summary, watch: Stopwatch) -> Summary:
    """Write summary.json and the report page; returns the summary with the seconds of the whole
    process.
    """
    path, runs = (
        folder.path / "summary.json",
        [run.get("spent_s", {}) for run in summed["runs"].values()],
    )
    write_atomically(path, to_json(summed | {"spent_s": watch.spent_s(runs)}, indent=1))
    with watch.report():
        write_report(folder.path)
    summed = summed | {"spent_s": watch.spent_s(runs)}
    write_atomically(path, to_json(summed, indent=1))
    return summed
