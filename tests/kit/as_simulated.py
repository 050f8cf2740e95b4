"""Real peers' factors against those of their simulation."""

from __future__ import annotations

from pathlib import Path

import dlora
from kit.processes import Federation
from kit.updates import UPDATE_BOUND, assert_same, update_of


def assert_as_simulated(peers: Federation) -> None:
    """No edge was left out and no difference mixed twice: the factors are those of an undisturbed
    run (law 5).
    """
    config = peers.config
    dlora.simulate(config)
    for name in peers.names:
        for adapter in (f"peers/{name}", "consensus"):
            update, reference = (
                update_of(config, Path(run) / adapter)
                for run in (peers.run(name), config.output_dir)
            )
            assert_same(update, reference, UPDATE_BOUND["adamw"], "classification")
