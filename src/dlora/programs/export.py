"""One peer's adapter out of the file that a run of many peers writes."""

from __future__ import annotations

from pathlib import Path

from dlora.errors import RunError
from dlora.lora.adapter_io import save_adapter
from dlora.lora.all_adapters import load_one, part_files
from dlora.programs.score import run_model
from dlora.run.folder import ALL_ADAPTERS, resume_command


def export(run: Path | str, peer: str, folder: Path | str | None = None) -> Path:
    """Write the adapter of ``peer`` as a folder that PEFT loads; returns the folder.

    ``folder``: default RUN/peers/PEER. Raises RunError if it is there already, or if the run or the
    peer is not.
    """
    run = Path(run)
    target = run / "peers" / peer if folder is None else Path(folder)
    if target.exists():
        raise RunError(f"{target} is there already; name another folder with --output")
    if not (run / "consensus").is_dir():
        raise RunError(f"{run} has no adapters yet; finish it with: {resume_command(run)}")
    files = part_files(run, ALL_ADAPTERS)
    if not files:
        raise RunError(
            f"{run} has no {ALL_ADAPTERS}.safetensors, which only a simulation of many peers"
            " writes; the adapters of its peers are folders in peers/"
        )
    factors = load_one(files, peer)
    _, model = run_model(run)
    save_adapter(target, factors, model)
    return target
