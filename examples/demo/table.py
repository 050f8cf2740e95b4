"""Print the demo's outcome as a small table: alone, together, pooled."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROWS = (
    ("local", "peers_mean", "each organisation alone"),
    ("dec-lora", "peers_mean", "Dec-LoRA, each organisation's own"),
    ("dec-lora", "consensus", "Dec-LoRA, the average of all"),
    ("pooled", "consensus", "all texts in one place"),
)


def table(run: Path) -> str:
    """The lines to print, from a run folder's summary.json."""
    runs = json.loads((run / "summary.json").read_text(encoding="utf-8"))["runs"]
    lines = [f"{title:<36}{runs[name][score]['accuracy']:>8.1%}" for name, score, title in ROWS]
    ratio = runs["dec-lora"]["consensus"]["accuracy"] / runs["pooled"]["consensus"]["accuracy"]
    return (
        "\n".join([f"{'right about all eight libraries':<36}{'accuracy':>8}", *lines])
        + f"\n\nTogether the organisations reach {ratio:.0%} of pooled training; no text left its"
        f" organisation.\nThe report: {run / 'report.html'}"
    )


if __name__ == "__main__":
    print(f"\n{table(Path(sys.argv[1]))}")
