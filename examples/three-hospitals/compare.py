"""What three peers ended with: their scores, what went over the wire, how far their adapters are
apart.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file


def main(folder: Path) -> None:
    """Print the table of the peers whose run folders lie in ``folder``."""
    summaries = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(folder.glob("*/summary.json"))
    }
    table = Table(
        "hospital",
        "labels",
        "own adapter",
        "consensus",
        "mixed",
        "left out",
        "on wire",
        "time",
        box=None,
    )
    for name, summary in summaries.items():
        run, labels = summary["runs"]["dec-lora"], summary["peers"][name]["labels"]
        has = f"{sum(count > 0 for count in labels.values())} of {len(labels)}"
        scores = [f"{100 * run[of]['accuracy']:.1f} %" for of in ("peers_mean", "consensus")]
        mixed, left_out = (
            sum(edge[state] for edge in run["edges"].values()) for state in ("mixed", "left_out")
        )
        wire = f"{run['bytes_on_wire'] / 1e6:.1f} MB"
        table.add_row(
            name, has, *scores, str(mixed), str(left_out), wire, f"{run['seconds']:.0f} s"
        )
    print()
    Console().print(table)
    print()
    for what, place in {"own adapters": "peers/{}", "consensus adapters": "consensus"}.items():
        files = [
            folder / name / place.format(name) / "adapter_model.safetensors" for name in summaries
        ]
        if len({file.read_bytes() for file in files}) == 1:
            print(f"{what}: the same file everywhere, to the last byte")
        else:
            pairs = combinations(map(load_file, files), 2)
            apart = max(
                (one[key] - other[key]).abs().max().item() for one, other in pairs for key in one
            )
            print(f"{what}: no number differs by more than {apart:.2g} between two hospitals")
    print(
        "\nAlone, a hospital can be right only about the labels that it has. Here each hospital"
        " learnt from all.\nLoRA factors travelled between the three processes; texts and keys did"
        " not. There was no server."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
