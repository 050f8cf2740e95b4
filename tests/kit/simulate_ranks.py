"""Simulations under real torchrun: this file is the script, and what a test starts it with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlora.config.run import Config

LIMIT_S = 300.0
RUNS = Path(__file__)


def torchrun(
    ranks: int,
    arguments: Sequence[str | Path],
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    alone: bool = True,
) -> subprocess.Popen[str]:
    """``torchrun --nproc-per-node RANKS ARGUMENTS``, its output in pipes.

    ``alone``: no other machine takes part.
    """
    program = shutil.which("torchrun", path=Path(sys.executable).parent.as_posix())
    assert program is not None
    return subprocess.Popen(
        [
            program,
            *(["--standalone"] if alone else []),
            "--nproc-per-node",
            str(ranks),
            *options,
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | (environment or {}),
    )


def simulated(ranks: int, configs: Mapping[str, Config], folder: Path) -> dict[str, Any]:
    """The summary of each config's run by so many ranks, in one call of torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(config.dump())
    process = torchrun(ranks, [RUNS, folder, *configs])
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, out[-3000:] + err[:6000]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in configs}


def main() -> None:
    """Run each config that is named, one after the other; the main rank writes the summaries."""
    import dlora

    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        config = Config.load(folder / f"{name}.yaml")
        resume = Path(config.output_dir, "config.yaml").exists()
        summary = dlora.simulate(config, resume=resume)
        if os.environ["RANK"] == "0":
            (folder / f"{name}.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
