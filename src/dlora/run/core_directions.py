"""Where a run's core directions come from: its folder, a file that was given to it, or the
model.
"""

from __future__ import annotations

from pathlib import Path

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.errors import ConfigError
from dlora.lora.core import DIRECTIONS_FILE, Directions, compute_directions, is_in, read_directions
from dlora.model.layers import block_linears
from dlora.model.load import load_body_network


def kept_directions(config: Config, resume: bool) -> Directions | None:
    """The core directions of the resumed run, or else those of the file ``lora.frame``.

    None if they must be computed. Raises ConfigError if the two differ, or if the file can be
    neither read nor made.
    """
    kept, handed = (
        Path(config.output_dir, DIRECTIONS_FILE),
        Path(config.lora.frame) if config.lora.frame else None,
    )
    if resume and kept.exists():
        directions = read_directions(kept)
        if handed and handed.exists() and not is_in(directions, read_directions(handed)):
            raise ConfigError(
                f"lora.frame: {handed} is another frame than {kept}, which this run began with;"
                " give that one"
            )
        return directions
    if handed and not handed.parent.is_dir():
        raise ConfigError(
            f"lora.frame: {handed} can neither be read nor made, for {handed.parent} is no folder;"
            " make it"
        )
    return read_directions(handed) if handed and handed.exists() else None


def handed_directions(config: Config) -> Directions | None:
    """The core directions in the file that a device was given; None without placement core.

    A device has no weights to compute them from. Raises ConfigError if the file is missing.
    """
    if config.lora.placement != "core":
        return None
    given = config.lora.frame
    if given is None or not Path(given).is_file():
        what = "is missing" if given is None else f"{given} is no file"
        raise ConfigError(
            f"lora.frame: {what}; a device has no weights to find its frame in: copy the cloud's"
            " file (core.frame in its config) here, and name it"
        )
    return read_directions(Path(given))


def whole_directions(config: Config) -> Directions:
    """Compute the core directions of all linears of the body; the keys are names in the body."""
    network = load_body_network(CloudConfig.parse({"model": config.model, "device": config.device}))
    return compute_directions(
        {name: network.get_submodule(name) for name in block_linears(network)}, config.lora.r
    )
