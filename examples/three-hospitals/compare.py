"""What three peers ended with: their scores, how far their adapters are apart, what went over the wire."""

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
    summaries = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))}
    table = Table("hospital", "own adapter", "consensus", "peers in it", "rounds mixed", "left out", "on wire", box=None)
    for name, summary in summaries.items():
        run = summary["runs"]["dec-lora"]
        mixed, dropped = (sum(edge[state] for edge in run["edges"].values()) for state in ("mixed", "left_out"))
        scores = [f"{100 * run[of]['accuracy']:.1f} %" for of in ("peers_mean", "consensus")]
        counts = [str(run["consensus_peers"]), str(mixed), str(dropped), f"{run['bytes_on_wire'] / 1e6:.1f} MB"]
        table.add_row(name, *scores, *counts)
    Console().print(table)
    for what in ("consensus", "peers/{name}"):
        adapters = {name: load_file(folder / name / what.format(name=name) / "adapter_model.safetensors") for name in summaries}
        apart = max(
            (adapters[one][key] - adapters[two][key]).abs().max().item()
            for one, two in combinations(adapters, 2)
            for key in adapters[one]
        )
        print(f"{what.format(name='<name>')}: the largest difference between two hospitals' adapters is {apart:.2g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
