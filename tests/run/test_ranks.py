"""A site of several processes is one peer: real torchrun, two sites of two processes each."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dlora.programs.local import local
from kit import rank_script, rank_trainer

ROUNDS = 3


def alone() -> tuple[list[dict[str, float]], dict[str, float]]:
    """The sums of each site's tensors and of the average, computed in one process: both ranks'
    rows are one batch, and two sites that mix with weight 1/2 have the mean.
    """
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).state_dict()
    models = [nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2)]
    for round in range(ROUNDS):
        for index, model in enumerate(models):
            if not round:
                model.load_state_dict(start)
            rows = []
            for rank in range(2):
                drawn = torch.Generator().manual_seed(100 * index + 10 * round + rank)
                rows.append(
                    (torch.randn(5, 6, generator=drawn), torch.randn(5, 2, generator=drawn))
                )
            x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
            model.zero_grad()
            (model(x) - y).square().mean().backward()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name != "0.bias":
                        assert parameter.grad is not None
                        parameter.sub_(0.1 * parameter.grad)
        with torch.no_grad():
            for pair in zip(*(model.parameters() for model in models), strict=True):
                mean = torch.stack(pair).mean(dim=0)
                for parameter in pair:
                    parameter.copy_(mean)
    sums = [
        {name: value.detach().double().sum().item() for name, value in model.named_parameters()}
        for model in models
    ]
    average = {name: value for name, value in sums[0].items() if name != "0.bias"}
    return sums, average


def two_sites(folder: Path, script: str, *arguments: str) -> list[str]:
    """Run a script as two peers of two processes each; what they said."""
    torchrun = shutil.which("torchrun", path=Path(sys.executable).parent.as_posix())
    assert torchrun is not None
    said: list[str] = []
    told = local(
        torchrun,
        ["--standalone", "--nproc-per-node", "2", script, *arguments],
        peers=2,
        rounds=ROUNDS,
        folder=folder,
        say=said.append,
    )
    for one in told["peers"].values():
        assert (one["exit_code"], one["rounds"], one["edges"]) == (0, ROUNDS, ROUNDS), said
    return said


@pytest.mark.slow
def test_a_trainer_of_two_processes_is_one_peer(tmp_path: Path) -> None:
    said = two_sites(tmp_path / "sites", rank_trainer.__file__, str(tmp_path))
    for index in range(2):
        line = re.compile(rf"peer-{index} \| own [01] (\S+)$")
        ended = [match[1] for one in said if (match := line.match(one))]
        assert len(ended) == 2 and ended[0] == ended[1], said
    one, other = (
        load_file(tmp_path / str(index) / "consensus" / "adapter_model.safetensors")
        for index in range(2)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_site_of_two_processes_is_one_peer(tmp_path: Path, kind: str) -> None:
    said = two_sites(tmp_path / "sites", rank_script.__file__, kind, str(ROUNDS))
    own, average = alone()
    for what, wanted in (("own", own), ("average", [average] * 2)):
        for index, sums in enumerate(wanted):
            for rank in range(2):
                line = re.compile(rf"peer-{index} \| {what} {rank} (\S+)=(\S+)")
                found = {match[1]: float(match[2]) for one in said if (match := line.match(one))}
                assert found.keys() == sums.keys(), (what, index, rank, said)
                for name, value in sums.items():
                    assert found[name] == pytest.approx(value, abs=1e-5), (what, name)
