"""The public names of dlora. Importing this package loads no large library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dlora.version import __version__

if TYPE_CHECKING:
    from dlora.config.cloud import CloudConfig
    from dlora.config.run import Config
    from dlora.decentralized.topology import Topology, build_topology, spectral_gap
    from dlora.errors import CloudError, DloraError, Interrupted, UserError
    from dlora.programs.connect import connect
    from dlora.programs.score import load_base, score
    from dlora.programs.script import Peer
    from dlora.programs.simulate import simulate
    from dlora.programs.trainer_callback import PeerCallback
    from dlora.show.report.write import write_report

_HOMES = {
    "CloudConfig": "dlora.config.cloud",
    "CloudError": "dlora.errors",
    "Config": "dlora.config.run",
    "DloraError": "dlora.errors",
    "Interrupted": "dlora.errors",
    "Peer": "dlora.programs.script",
    "PeerCallback": "dlora.programs.trainer_callback",
    "Topology": "dlora.decentralized.topology",
    "UserError": "dlora.errors",
    "build_topology": "dlora.decentralized.topology",
    "connect": "dlora.programs.connect",
    "load_base": "dlora.programs.score",
    "score": "dlora.programs.score",
    "simulate": "dlora.programs.simulate",
    "spectral_gap": "dlora.decentralized.topology",
    "write_report": "dlora.show.report.write",
}

__all__ = [
    "CloudConfig",
    "CloudError",
    "Config",
    "DloraError",
    "Interrupted",
    "Peer",
    "PeerCallback",
    "Topology",
    "UserError",
    "__version__",
    "build_topology",
    "connect",
    "load_base",
    "score",
    "simulate",
    "spectral_gap",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used, because torch takes seconds.

    Raises AttributeError for any other name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'dlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The names that completion shows."""
    return __all__
