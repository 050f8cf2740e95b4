"""What devices with neighbours ended with: scores alone and together, bytes planned and counted on
both wires.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def main(folder: Path, devices: list[str]) -> None:
    """Print the tables of the devices whose run folders lie in ``folder``."""
    simulated = runs(folder / "simulation")
    scores = Table(
        "device",
        "labels it has",
        "alone",
        "its own",
        "average of all",
        "without any wire",
        box=None,
    )
    wires = Table(
        "device",
        "cloud: planned",
        "counted",
        "neighbours: planned",
        "counted",
        "edges mixed",
        box=None,
    )
    for name in devices:
        run = runs(folder / name)["dec-lora"]
        labels = json.loads((folder / name / "summary.json").read_text())["peers"][name]["labels"]
        reached = [
            simulated["local"]["peers"][name],
            run["peers_mean"],
            run["consensus"],
            simulated["dec-lora"]["consensus"],
        ]
        has = ", ".join(label for label, count in labels.items() if count)
        scores.add_row(name, has, *(f"{100 * of['accuracy']:.1f} %" for of in reached))
        planned = json.loads((folder / f"{name}.plan.json").read_text())
        between = sum(
            count for edge, count in planned["edges"].items() if name in edge.split(" - ")
        )
        counts = [
            planned["cloud"]["cloud_bytes"],
            run["cloud_bytes"],
            between,
            run["bytes_on_wire"],
        ]
        mixed, due = (
            sum(edge[of] for edge in run["edges"].values() for of in states) for states in STATES
        )
        wires.add_row(name, *(f"{count / 1e6:,.1f} MB" for count in counts), f"{mixed} of {due}")
    print()
    Console().print(scores)
    print()
    Console().print(wires)
    print()
    adapters = {
        (folder / name / "consensus" / "adapter_model.safetensors").read_bytes() for name in devices
    }
    print(
        "the averaged adapter: "
        + ("the same file" if len(adapters) == 1 else "not the same")
        + " at all devices"
    )


STATES = (("mixed",), ("mixed", "left_out", "in_doubt"))


def runs(folder: Path) -> dict[str, Any]:
    """The runs in a summary."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())["runs"]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
