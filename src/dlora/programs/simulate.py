"""n peers in one process, and the baselines that tell what their agreement is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import dlora
from dlora.config import Config
from dlora.decentralized.topology import spectral_gap
from dlora.evaluate import primary_metric
from dlora.lora.factors import num_parameters, stack
from dlora.programs.one_run import Run
from dlora.programs.prepare import Prepared, fitting_group_size, manifest_hash, manifest_text, prepare
from dlora.programs.run_folder import RunFolder
from dlora.report import write_report
from dlora.runlog import Listener, RunLog, to_json, write_atomically

Summary = dict[str, Any]


def simulate(
    config: Config,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Run Dec-LoRA and the baselines of ``config.compare``; return what summary.json holds.

    ``stop`` is asked after every round; once it says yes the round is saved and Interrupted raised.
    Raises UserError before anything is written when the run cannot start.
    """
    if not resume:
        RunFolder.check_new(config)
    prepared = prepare(config, lambda text: [listen({"event": "phase", "text": text}) for listen in listeners])
    folder = RunFolder.resume(config, manifest_text(prepared.manifest)) if resume else RunFolder.create(config)
    runs = ("dec-lora", *config.compare)
    stored = {run: folder.latest(run) for run in runs}
    group_size = next((c.state["environment"]["group_size"] for c in stored.values() if c), 0) or fitting_group_size(prepared)
    with RunLog(folder.log_path, listeners) as log:
        if resume:
            log.truncate(max((c.result or c.state)["log_position"] if c else 0 for c in stored.values()))
        if log.position == 0:
            write_atomically(folder.path / "manifest.json", manifest_text(prepared.manifest))
            log.emit("start", **_introduction(prepared, runs, group_size))
        started = time.monotonic()
        results = {}
        for run in runs:
            checkpoint = stored[run]
            if checkpoint and checkpoint.result and checkpoint.rounds_done >= config.train.rounds:
                results[run] = checkpoint.result["result"]
            else:
                results[run] = Run(run, prepared, folder, log, group_size, stop).result(checkpoint)
        summary = _summary(prepared, results, group_size, sum(result["seconds"] for result in results.values()))
        log.emit("done", seconds=time.monotonic() - started)
        write_atomically(folder.path / "summary.json", to_json(summary, indent=1))
    write_report(folder.path)
    return summary


def dry_run(config: Config) -> Summary:
    """Check everything a run needs and say what it would be; nothing is written."""
    RunFolder.check_new(config)
    prepared = prepare(config)
    return _introduction(prepared, ("dec-lora", *config.compare), fitting_group_size(prepared)) | {
        "local_steps": prepared.local_steps,
        "manifest": manifest_hash(prepared.manifest),
    }


def _introduction(prepared: Prepared, runs: Sequence[str], group_size: int) -> dict[str, Any]:
    """The log's first event: what is about to run."""
    data, topology = prepared.data, prepared.topology
    labels = data.label_counts or dict.fromkeys(prepared.names)
    return {
        "version": dlora.__version__,
        "model": prepared.config.model,
        "task": prepared.config.task,
        "metric": "accuracy" if prepared.config.task == "classification" or data.choices else "loss",
        "runs": list(runs),
        "peers": [{"name": name, "rows": len(data.peers[name]), "labels": labels[name]} for name in prepared.names],
        "edges": [topology.edges(round) for round in range(topology.period)],
        "spectral_gap": spectral_gap(topology),
        "trainable_parameters": num_parameters(stack(prepared.trained, 1)),
        "message_bytes": prepared.message_bytes,
        "group_size": group_size,
    }


def _summary(prepared: Prepared, results: dict[str, Summary], group_size: int, seconds: float) -> Summary:
    introduction = _introduction(prepared, list(results), group_size)
    return {
        "version": dlora.__version__,
        "model": prepared.config.model,
        "manifest": manifest_hash(prepared.manifest),
        "task": prepared.config.task,
        "metric": primary_metric(results["dec-lora"]["consensus"]),
        "seconds": seconds,
        **{key: introduction[key] for key in ("trainable_parameters", "message_bytes", "group_size", "spectral_gap")},
        "peers": {peer["name"]: {"rows": peer["rows"], "labels": peer["labels"]} for peer in introduction["peers"]},
        "runs": results,
    }
