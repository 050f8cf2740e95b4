"""Why a neighbour is in another run: one line with the first key in which two manifests differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Keys whose value follows from the other keys, so they are compared last -> what to do if only they
# differ.
_FOLLOW = {
    "frame": (
        "an SVD differs from machine to machine: let one make the file that lora.frame names, and"
        " hand it round"
    ),
    "initial_factors": (
        "they follow from lora.adapter, lora.init_lora_weights and seed: make these alike (pissa"
        " and olora also need alike machines)"
    ),
    "adapter": "make the adapter from the same config at every site",
    "frozen": "load the same model at every site, and change none of its frozen weights",
    "start": "set the same seed at every site before the adapter is made",
}


def difference(here: str, manifest: str, there: str, other_manifest: str) -> str:
    """One line with the first key in which two manifests differ, and both values.

    ``here`` and ``there`` are the names of the two peers.
    """
    try:
        other: Any = json.loads(other_manifest)
    except (ValueError, RecursionError):
        other = None
    if not isinstance(other, Mapping):
        return f"{there} is in another run, and its manifest cannot be read"
    own = json.loads(manifest)
    for key in sorted(own.keys() | other.keys(), key=lambda key: (key in _FOLLOW, key)):
        if own.get(key) != other.get(key):
            name = key if key in own else json.dumps(key)[:80]
            where, *values = _leaf(name, own.get(key), other.get(key))
            if where.startswith("start."):  # a script's tensor, by name
                where = f"the first value of {where.removeprefix('start.')}"
            mine, theirs = map(_told, values)
            remedy = _FOLLOW.get(key, "make them alike")
            return (
                f"{there} is in another run: {where} is {mine} at {here} and {theirs} at {there};"
                f" {remedy}"
            )
    return (
        f"{there} is in another run, though the manifests read alike; the versions of dlora may"
        " differ"
    )


def _told(value: Any) -> str:
    """A value in ASCII, because a terminal shows it; of a long list the first item."""
    if isinstance(value, list) and len(value) > 3:
        return f"{json.dumps(value[:1])[:200]} and {len(value) - 1} more"
    return "nothing" if value == [] else json.dumps(value)[:200]


def _leaf(name: str, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
    """The name and both values of the first difference inside two values; for lists, the items that
    only one has.
    """
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in sorted(mine):  # our own keys only: a key that the other end wrote is not printed
            if mine[key] != theirs.get(key):
                return _leaf(f"{name}.{key}", mine[key], theirs.get(key))
    if isinstance(mine, list) and isinstance(theirs, list):
        only = (
            [value for value in mine if value not in theirs],
            [value for value in theirs if value not in mine],
        )
        if any(only):
            return f"{name} (where they differ)", *only
    return name, mine, theirs
