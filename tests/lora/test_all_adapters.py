"""A run of many peers writes their adapters into one file; `dlora export` makes one a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dlora
from dlora.config.run import Config
from dlora.errors import RunError
from dlora.lora.all_adapters import load_one, save_all
from dlora.programs.export import export
from kit.call_cli import call

pytestmark = pytest.mark.usefixtures("no_page")


def test_an_exported_adapter_is_the_folder_that_a_run_of_few_peers_writes(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = make_config(**{"output_dir": str(tmp_path / "few")})
    many = few.model_copy(update={"output_dir": str(tmp_path / "many")})
    dlora.simulate(few)
    monkeypatch.setattr("dlora.run.simulated.MOST_FOLDERS", 3)
    dlora.simulate(many)
    assert not (tmp_path / "many" / "peers").exists()
    outcome = call("export", str(tmp_path / "many"), "--peer", "peer-2")
    assert outcome.exit_code == 0, outcome.err
    one, other = (tmp_path / run / "peers" / "peer-2" for run in ("few", "many"))
    assert outcome.out.strip() == str(other)
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    weights = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    mine, theirs = weights
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {"consensus", "peer-2"} == dlora.score(tmp_path / "many").keys()
    with pytest.raises(RunError, match="is there already"):
        export(tmp_path / "many", "peer-2")
    with pytest.raises(RunError, match=r"holds no peer nobody; it holds peer-0.*\(4 peers\)"):
        export(tmp_path / "many", "nobody")
    with pytest.raises(RunError, match="folders in peers/"):
        export(tmp_path / "few", "peer-1", tmp_path / "x")


def test_only_one_peers_rows_are_read(tmp_path: Path) -> None:
    factors = {"a.lora_A": torch.arange(6.0).view(3, 1, 2), "head.bias": torch.ones(3, 1)}
    save_all(tmp_path / "all", factors, ["x", "y", "z"])
    read = load_one([tmp_path / "all"], "y")
    assert torch.equal(read["a.lora_A"], torch.tensor([[[2.0, 3.0]]])) and len(read) == 2
    (tmp_path / "all").write_bytes(b"no tensors")
    with pytest.raises(RunError, match="cannot be read"):
        load_one([tmp_path / "all"], "y")
