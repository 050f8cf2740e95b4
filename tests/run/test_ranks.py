"""A site of several processes is one peer: real torchrun, two sites of two processes each."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dlora.programs.local import local
from kit import rank_script

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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_site_of_two_processes_is_one_peer(tmp_path: Path, kind: str) -> None:
    torchrun = shutil.which("torchrun", path=Path(sys.executable).parent.as_posix())
    assert torchrun is not None
    said: list[str] = []
    told = local(
        torchrun,
        ["--standalone", "--nproc-per-node", "2", rank_script.__file__, kind, str(ROUNDS)],
        peers=2,
        rounds=ROUNDS,
        folder=tmp_path / "sites",
        say=said.append,
    )
    assert {one["exit_code"] for one in told["peers"].values()} == {0}, "\n".join(said)
    own, average = alone()
    for what, wanted in (("own", own), ("average", [average] * 2)):
        for index, sums in enumerate(wanted):
            for rank in range(2):
                line = re.compile(rf"peer-{index} \| {what} {rank} (\S+)=(\S+)")
                found = {match[1]: float(match[2]) for one in said if (match := line.match(one))}
                assert found.keys() == sums.keys(), (what, index, rank, said)
                for name, value in sums.items():
                    assert found[name] == pytest.approx(value, abs=1e-5), (what, name)
