"""Runs that an earlier version began go on: folders and ledgers that it wrote are kept beside the
tests.

`kept/runs-of-0.1.0.tar.gz` holds a simulation that was stopped after two of four rounds, its
factors as that version ended it without a stop, and the folders of three real peers that were all
killed in round 2 while `north` was in doubt about an edge. Paths in them are written @FOLDER@ and
@MODEL@. A change that cannot read them loses its users' runs.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dlora
from kit.as_simulated import assert_as_simulated
from kit.call_cli import call, final_factors, furnish
from kit.processes import Federation, running

KEPT = Path(__file__).parent / "kept"
VERSIONS = ("0.1.0",)
LORA = {"r": 1, "lora_alpha": 2, "target_modules": ["query"]}


def unpack(version: str, folder: Path, replaced: dict[str, Path]) -> Path:
    """The kept folders of ``version``, with the paths of this test in their configs and logs."""
    with tarfile.open(KEPT / f"runs-of-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    for path in (*folder.rglob("*.yaml"), *folder.rglob("*.jsonl")):
        text = path.read_text()
        for mark, real in replaced.items():
            text = text.replace(mark, str(real))
        path.write_text(text)
    return folder


# by torch's CPU build
@pytest.mark.filterwarnings("ignore:this run was saved with .*torch")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_simulation_of_an_earlier_version_goes_on(
    version: str, tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"lora": LORA, "train.rounds": 4, "compare": ["pooled"], "eval_every": 1}
    monkeypatch.chdir(furnish(tmp_path / "here", model_folder("bert"), changes))
    kept = unpack(version, tmp_path / "kept", {})
    (kept / "simulation").rename("run")
    outcome = call("simulate", "run.yaml", "--resume")
    assert outcome.exit_code == 0, outcome.err
    dlora.simulate(dlora.Config.load("run.yaml", ["output_dir=uninterrupted"]))
    # law 10, but for rounding: the kept rounds may come from another processor
    ended = final_factors(Path("run"))
    for whole in (
        final_factors(Path("uninterrupted")),
        load_file(kept / "simulation-whole.safetensors"),
    ):
        for name, tensor in whole.items():
            torch.testing.assert_close(ended[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_peers_that_ran_an_earlier_version_go_on(
    version: str, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """The edge in doubt is settled, every round is mixed once, and the end is that of an
    undisturbed run (law 5).
    """
    changes = {"lora": LORA, "train.rounds": 6, "eval_every": 0}
    peers = Federation(tmp_path, model_folder("bert"), changes, names=("north", "east", "south"))
    kept = unpack(
        version, tmp_path / "kept", {"@FOLDER@": tmp_path, "@MODEL@": model_folder("bert")}
    )
    (kept / "peers").rename(tmp_path / "runs")
    assert "promised" in peers.ledger("north").values()  # the doubt is there, so this can fail
    with running(peers):
        for name in peers.names:
            peers.start(name, "--resume")
        outcomes = peers.finish_all()
    assert {
        name: (outcome.exit_code, outcome.err) for name, outcome in outcomes.items()
    } == dict.fromkeys(peers.names, (0, ""))
    peers.assert_agreed()
    assert_as_simulated(peers)
