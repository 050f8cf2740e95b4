"""What docs/scripts.md tells a reader to type and to write is done here; its examples run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import nn

import dlora
from dlora.programs.local import local
from kit.page_blocks import ROOT, Walk
from kit.ports import free_ports

PAGE = "docs/scripts.md"
NAMES = ("north", "south", "west")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("default"),  # a person sees a line, no error
]


class Small(nn.Module):
    """A model with a loss, as transformers' are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return transformers.utils.ModelOutput(loss=self.linear(x).square().mean())

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir()


def script(page: Walk) -> str:
    """The page's loop as train.py, with what it takes for granted before it."""
    block = page.take("import dlora").text
    head = [
        "import torch, sys",
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})",
        "from examples.test_script_pages import Small",
        "torch.manual_seed(0)",
        "model = Small()",
        "loader = [{'x': torch.ones(3, 4)}] * 1000",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)",
    ]
    return "\n".join([*head, block])


def test_the_page_of_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    with Walk(PAGE, tmp_path, {"north.example:7001": f"127.0.0.1:{ports['north']}"}) as page:
        for name in NAMES[1:]:
            page.command(f"dlora identity new {name} --address 127.0.0.1:{ports[name]}")
        page.type("dlora identity new north")
        page.write("members: [north, south, west]", "peers.yaml")
        assert yaml.safe_load(Path("peers.yaml").read_text())["rounds"] == 10
        Path("loop.py").write_text(script(page).replace('name="north", key="north.key", ', ""))
        line = page.take("DLORA_PEERS=peers.yaml").text.replace("train.py", "loop.py")
        # one folder for each site, as each has a machine of its own
        for name in NAMES:
            Path(name).mkdir()
            for file in Path().glob("*.*"):
                if file.is_file():
                    shutil.copy(file, name)
        lines = [f"(cd {name} && {line.replace('north', name)}) &" for name in NAMES]
        page.command("\n".join([*lines, "for job in $(jobs -p); do wait $job; done"]))
        assert all(Path(name, "consensus").is_dir() for name in NAMES)
        for variable, value in {
            "DLORA_PEERS": "peers.yaml",
            "DLORA_NAME": "north",
            "DLORA_KEY": "north.key",
            "DLORA_FEDERATION": "federation.yaml",
        }.items():
            monkeypatch.setenv(variable, value)
        added: list[Any] = []
        trainer = type("Trainer", (), {"add_callback": lambda self, one: added.append(one)})()
        page.python("trainer = SFTTrainer", trainer=trainer, dlora=dlora)
        assert added[0].every_steps == 20
        Path("peers.yaml").write_text(
            yaml.safe_dump({"members": ["north"], "rounds": 3, "state_dir": "other"})
        )
        peer, model = dlora.Peer(), Small()
        with peer.joined(model):
            peer.mix()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            names = {"torch": torch, "os": os, "peer": peer, "model": model, "optimizer": optimizer}
            page.python("state = peer.state_dict()", **names, step=20)
        again = dlora.Peer()
        page.python("checkpoint = torch.load", **names | {"peer": again})
        with again.joined(model):
            assert again.state_dict()["progress"]["rounds_done"] == 1
        assert page.take("dlora local").commands() == [
            "dlora local --peers 4 --rounds 3 examples/trl-sft/sft.py -- --max-steps 60"
        ]
        assert [block.first for block in page.left] == []


@pytest.mark.parametrize(
    ("example", "arguments", "rounds"),
    [
        ("examples/trl-sft/sft.py", ["--max-steps", "4", "--rows", "40"], 2),
        ("examples/any-loop/loop.py", [], 4),
    ],
)
def test_an_example_runs_as_two_sites(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    example: str,
    arguments: list[str],
    rounds: int,
) -> None:
    """With real text and a real small model; the TRL example mixes less often here."""
    if "DLORA_ASSETS" not in os.environ:
        pytest.skip("needs DLORA_ASSETS")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "script.py"
    script.write_text((ROOT / example).read_text().replace("every_steps=20", "every_steps=2"))
    said: list[str] = []
    told = local(str(script), arguments, peers=2, rounds=rounds, say=said.append)
    text = "\n".join(said)
    assert {one["exit_code"] for one in told["peers"].values()} == {0}, text[-3000:]
    assert all(one["rounds"] == one["edges"] == rounds for one in told["peers"].values())
    if "trl" in example:
        names = [tmp_path / "runs" / "trl-sft" / f"site-{index}" for index in range(2)]
        adapters = [
            (name / "consensus" / "adapter_model.safetensors").read_bytes() for name in names
        ]
        assert adapters[0] == adapters[1]
        config = json.loads((names[0] / "consensus" / "adapter_config.json").read_text())
        assert config["r"] == 8
    else:
        assert "loss of the average" in text
