"""An event whose fields nobody checks, such as another version of dlora may have written."""

from __future__ import annotations

from typing import Any


def any_event(kind: str, **fields: Any) -> Any:
    """The event as a log and its listeners take it."""
    return {"event": kind, **fields}
