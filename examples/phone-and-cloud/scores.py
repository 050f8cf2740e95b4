"""What two devices ended with: scores with and without the cloud, how far the adapters are apart,
bytes planned and counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

DEVICES = ("phone", "tablet")
ADAPTER = "consensus/adapter_model.safetensors"


def main(folder: Path) -> None:
    """Print the tables of the devices whose run folders lie in ``folder``."""
    scores = Table(
        "device", "tells apart", "wire", "untrained", "through the cloud", "without", box=None
    )
    wires = Table("device", "planned: down", "up", "both", "counted", box=None)
    for name in DEVICES:
        config = yaml.safe_load((folder / name / "config.yaml").read_text())
        log = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
        untrained = next(event["consensus"] for event in log if event["event"] == "scores")
        run, alone = (
            result(folder / name)["dlora"],
            result(folder / "without-cloud" / name)["dec-lora"],
        )
        reached = [
            f"{100 * of['accuracy']:.1f} %"
            for of in (untrained, run["consensus"], alone["consensus"])
        ]
        scores.add_row(name, ", ".join(config["data"]["labels"]), config["split"]["wire"], *reached)
        planned = json.loads((folder / f"{name}.plan.json").read_text())["cloud"]
        counts = [*(planned[f"{way}_bytes"] for way in ("down", "up", "cloud")), run["cloud_bytes"]]
        wires.add_row(name, *(f"{count / 1e6:,.0f} MB" for count in counts))
    print()
    Console().print(scores)
    print()
    for name in DEVICES:
        ours, theirs = (
            load_file(place / name / ADAPTER) for place in (folder, folder / "without-cloud")
        )
        apart = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
        largest = max(tensor.abs().max().item() for tensor in theirs.values())
        print(
            f"{name}: no number of its adapter is further than {apart:.1e} from training without a"
            f" cloud; largest {largest:.2g}"
        )
    print()
    Console().print(wires)


def result(run: Path) -> dict[str, Any]:
    """The runs in a summary."""
    runs: dict[str, Any] = json.loads((run / "summary.json").read_text())["runs"]
    return runs


if __name__ == "__main__":
    main(Path(sys.argv[1]))
