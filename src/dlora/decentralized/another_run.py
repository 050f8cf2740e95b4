"""Why a neighbour is in another run: the first key in which two manifests differ, in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What follows from the rest of a manifest, and so is looked at last; what to do where it differs all the same.
_FOLLOW = {
    "frame": "an SVD differs from machine to machine: let one make the file that lora.frame names, and hand it round",
    "initial_factors": "make them alike",
}


def difference(here: str, manifest: str, there: str, other_manifest: str) -> str:
    """The first key in which two manifests differ, with both values."""
    try:
        other: Any = json.loads(other_manifest)
    except (ValueError, RecursionError):
        other = None
    if not isinstance(other, Mapping):
        return f"{there} is in another run, and its manifest cannot be read"
    own = json.loads(manifest)
    for key in sorted(own.keys() | other.keys(), key=lambda key: (key in _FOLLOW, key)):
        if own.get(key) != other.get(key):
            mine, theirs = (json.dumps(tree.get(key))[:200] for tree in (own, other))  # ASCII: it goes to a terminal
            name = key if key in own else json.dumps(key)[:80]
            remedy = _FOLLOW.get(key, "make them alike")
            return f"{there} is in another run: {name} is {mine} at {here} and {theirs} at {there}; {remedy}"
    return f"{there} is in another run, though the manifests read alike; the versions of dlora may differ"
