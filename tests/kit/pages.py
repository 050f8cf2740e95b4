"""The pages that people read."""

from __future__ import annotations

from kit.page_blocks import ROOT

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
LOG = "docs/lab-log.md"  # what was measured once, with the commands of that day
