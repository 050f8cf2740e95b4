"""Mistakes that the config and the names of its files show, before anything slow is imported."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from dlora.config.launchers import launched, refuse_ranks
from dlora.config.run import Config
from dlora.config.tasks import TASKS
from dlora.config.training import DataSection, PartitionSection
from dlora.data.rows import check_there
from dlora.errors import ConfigError


def look(config: Config, program: str, name: str | None) -> None:
    """Raise UserError where ``program`` cannot start (as ``name``, if it is one participant). The
    programs check the same and more once their libraries are imported.
    """
    if program in ("simulate", "peer"):
        launched(os.environ)
    else:
        refuse_ranks(os.environ)
    section = config.data
    if name is not None:
        members = members_of(config, name) if program == "peer" or config.peers.members else None
        section = own_section(section, config.task, name, alone=members is None)
    for source in (section.train, section.eval):
        for path in source.values() if isinstance(source, Mapping) else [source]:
            check_there(path)


def members_of(config: Config, name: str) -> tuple[str, ...]:
    """Who takes part. Raises ConfigError where nobody is named, where ``name`` is not among them,
    and where the config asks for what needs everybody's data.
    """
    members = config.peers.members
    if members is None:
        raise ConfigError(
            "peers.members is missing; a real peer needs the names of all, such as members: [north,"
            " south, west]"
        )
    if name not in members:
        near = difflib.get_close_matches(name, members, n=1)
        raise ConfigError(
            f"--name {name} is not in peers.members ({', '.join(members)})"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    refuse_comparison(config)
    return members


def refuse_comparison(config: Config) -> None:
    """Raise ConfigError where one participant is asked for what only a simulation can do."""
    if config.peers.participation < 1:
        raise ConfigError(
            f"peers.participation {config.peers.participation:g} is for dlora simulate; a real peer"
            " takes part in every round: remove it"
        )
    if config.compare:
        raise ConfigError(
            "compare needs everybody's data in one place; remove it, or use dlora simulate"
        )


def own_section(section: DataSection, task: str, name: str, alone: bool) -> DataSection:
    """The part of ``data`` that is for one real participant: its own file, where ``train`` names
    one for each.

    Raises ConfigError for what divides rows, and where labels would have to be guessed: with
    neighbours nobody sees all.
    """
    if isinstance(section.train, dict):
        if name not in section.train:
            raise ConfigError(
                f"data.train names no file for {name}; add one, or give this peer's own file alone"
            )
        section = section.model_copy(
            update={"train": section.train[name], "partition": PartitionSection()}
        )
    if section.partition.kind != "iid":
        raise ConfigError(
            f"data.partition {section.partition.kind} divides rows among peers; a real peer has its"
            " own: remove it"
        )
    if TASKS[task].names_labels and section.labels is None and not alone:
        raise ConfigError(
            "data.labels is missing; a peer sees only its own labels, so the config must list all,"
            " in one order"
        )
    return section
