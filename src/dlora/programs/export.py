"""One adapter of a finished run as a folder: as PEFT loads it, or merged into the whole model."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

from safetensors import SafetensorError

from dlora.errors import RunError
from dlora.lora.adapter_io import merge_into, save_adapter
from dlora.lora.all_adapters import load_one, part_files
from dlora.model.load import load_model, load_tokenizer
from dlora.model.quiet import quietly
from dlora.programs.score import read_run, run_model
from dlora.run.folder import ALL_ADAPTERS, resume_command


def export(run: Path | str, peer: str | None, folder: Path | str | None = None) -> Path:
    """Write the adapter of ``peer`` as a folder that PEFT loads; returns the folder.

    ``folder``: default RUN/peers/PEER. Raises RunError if it is there already, or if the run or the
    peer is not.
    """
    run = Path(run)
    if peer is None:
        raise RunError("--peer is missing; name a peer, or write the average with --merge")
    target = _unused(run / "peers" / peer if folder is None else Path(folder))
    _refuse_unfinished(run)
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


def export_merged(
    run: Path | str, peer: str | None = None, folder: Path | str | None = None
) -> Path:
    """Write the run's model with the adapter of ``peer`` in its weights; returns the folder.

    transformers' from_pretrained loads the folder: float32 safetensors, the config with the names
    of the labels, and the tokenizer. ``peer``: None is the average. ``folder``: default
    RUN/merged/PEER or RUN/merged/consensus. A quantised model is dequantised before. Raises
    RunError if the folder is there already, cannot be written, or if the run or the peer is not.
    """
    run, name = Path(run), peer or "consensus"
    target = _unused(run / "merged" / name if folder is None else Path(folder))
    config, labels = read_run(run)
    _refuse_unfinished(run)
    if config.pooling is not None:
        raise RunError(
            f"{run}: transformers has no classifier that reads the mean over the tokens (pooling:"
            " mean); load it with dlora.load_base and PEFT"
        )
    if config.bottleneck is not None:
        raise RunError(
            f"{run}: a bottleneck adapter is a layer of its own, which no weight can hold; the"
            " README.md of its folder has code that loads it"
        )
    if config.quantization != "none":
        inputs = ", and int8 rounds the inputs too" if config.quantization == "int8" else ""
        warnings.warn(
            f"quantization {config.quantization}: the weights are dequantised and written in"
            f" float32; the model as it was before rounding has other ones{inputs}",
            stacklevel=2,
        )
    # as it is loaded anywhere: with its own dropout, and no part of it elsewhere
    own = config.train.model_copy(update={"model_dropout": None, "gradient_checkpointing": False})
    config = config.model_copy(update={"device": "cpu", "device_map": None, "train": own})
    with tempfile.TemporaryDirectory() as work:
        adapter = run / "consensus" if peer is None else run / "peers" / peer
        if not adapter.is_dir():
            adapter = export(run, name, Path(work, "adapter"))
        tokenizer = load_tokenizer(config.model)
        network = load_model(config, tokenizer, labels).network
        with quietly():
            if config.quantization != "none":
                network = network.dequantize()
            network = merge_into(network, adapter)
    made = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(made, ignore_errors=True)
        with quietly():
            network.save_pretrained(str(made))
        tokenizer.save_pretrained(str(made))
        made.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(made, ignore_errors=True)
        raise RunError(f"{target} cannot be written ({error})") from error
    return target


def _unused(target: Path) -> Path:
    if target.exists():
        raise RunError(f"{target} is there already; name another folder with --output")
    return target


def _refuse_unfinished(run: Path) -> None:
    if not (run / "consensus").is_dir():
        raise RunError(f"{run} has no adapters yet; finish it with: {resume_command(run)}")
