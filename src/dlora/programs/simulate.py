"""A simulation: n peers in one process or in several, and the baselines that show what their
agreement is worth.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dlora.config.arms import DEC_LORA
from dlora.config.launchers import restarts
from dlora.config.run import Config
from dlora.costs.between_peers import counted_bytes
from dlora.costs.scheduled import CHOSEN
from dlora.events.log import Listener, loading
from dlora.net.between_ranks import one_may_end
from dlora.run.account import Summary, introduction
from dlora.run.folder import RunFolder
from dlora.run.frozen_model import own_cloud
from dlora.run.grouping import find_grouping
from dlora.run.manifest import manifest_hash
from dlora.run.opening import began_here, opened
from dlora.run.prepare import prepare
from dlora.run.ranks import joined_ranks
from dlora.run.schedules import first_step
from dlora.run.simulated import Run
from dlora.run.waiting import find_waiting


def simulate(
    config: Config | str | Path,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    stop: Callable[[], bool] = lambda: False,
    whole_process: bool = False,
) -> Summary:
    """Run Dec-LoRA and the baselines of ``config.compare``; returns what summary.json holds.

    ``config`` may be the path of a YAML file. ``stop`` is called after every round; if it returns
    True, the round is saved and Interrupted is raised. A listener may raise Interrupted while
    participants are scored. If torchrun started several processes of the program, each calls this
    with the same arguments, and each returns the summary: the participants are dealt over them. A
    process that torchrun started again goes on from the last checkpoint. ``whole_process``: the
    start-up time in the summary begins with the process and not with this call. Raises UserError
    before anything is written if the run cannot start.
    """
    ranks = joined_ranks()
    config = ranks.together(partial(Config.given, config))
    arms = _arms(config)
    again = ranks.on_main(lambda: restarts(os.environ) > 0 and began_here(config))
    with opened(
        config,
        arms,
        resume=resume or again,
        listeners=listeners,
        stop=stop,
        whole_process=whole_process,
        ranks=ranks,
    ) as run:
        half = run.prepared.half
        cloud = own_cloud(half, config) if half else contextlib.nullcontext()
        # a pass of a divided model waits for the other processes too
        with cloud as cloud_bytes, one_may_end():
            run.begin()
            results: dict[str, Summary] = {}
            for arm in arms:
                if results:
                    # a Run refers to itself; its state stays until Python looks for such circles
                    gc.collect()
                results[arm] = run.finished(arm) or Run(arm, run, cloud_bytes).result()
        return run.conclude(results)


def dry_run(config: Config, *, listeners: Sequence[Listener] = ()) -> Summary:
    """Check everything that a run needs, and return its facts. Writes nothing.

    If ``output_dir`` holds this run already, ``stands`` says so.
    """
    stands = RunFolder.standing(config)
    prepared = prepare(config, loading(listeners))
    waiting = find_waiting(prepared) is not None
    grouping = find_grouping(prepared, waiting=waiting)
    topology, rounds = prepared.topology, config.train.rounds
    edges = [len(topology.edges_among(prepared.drawn(round), round)) for round in range(rounds)]
    return introduction(prepared, _arms(config), grouping.size) | {
        "local_steps": prepared.local_steps,
        "rounds": rounds,
        "messages_a_round": 2 * sum(edges) / rounds,
        # what the summary will say of dec-lora, or the most that it can
        "bytes_on_wire": counted_bytes(prepared),
        **({"at_most": True} if config.schedule.kind in CHOSEN else {}),
        **({"schedule": first_step(prepared)} if prepared.units else {}),
        **({"stands": stands} if stands else {}),
        "manifest": manifest_hash(prepared.manifest),
    }


def _arms(config: Config) -> tuple[str, ...]:
    return (DEC_LORA.name, *config.compare)
