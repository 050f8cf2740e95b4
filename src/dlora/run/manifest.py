"""What all participants of a run must agree on, as one text and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The manifest as canonical JSON: sorted keys, no spaces, not escaped to ASCII."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(manifest_text(manifest).encode()).hexdigest()
