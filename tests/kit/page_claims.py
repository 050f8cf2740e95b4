"""Which blocks of the pages a test does, and why no test does the others."""

from __future__ import annotations

# Page -> the first lines of the blocks that a test below does, in its order.
DONE = {
    "README.md": [
        "scripts/demo",
        "import dlora, peft",
        "model: pkg",
        "dlora simulate run.yaml --dry-run",
        "-model = AutoModel",
        "dlora identity new north",
        "dlora identity new hub",
        "model = dlora.connect",
    ],
    "docs/peers.md": [
        "dlora identity new north",
        "dlora identity show north",
        "dlora identity federation north",
        "model: pkg",
        "dlora plan run.yaml",
        "dlora peer run.yaml",
        "mkdir renewed",
    ],
    "docs/split.md": [
        "dlora identity new hub --role cloud --address 127.0.0.1",
        "model: pkg",
        "dlora cloud cloud.yaml --name hub --key hub.key --federation federation.yaml",
        "model: pkg",
        "dlora plan run.yaml",
        "dlora device run.yaml",
        "import json",
        "import json",
        "import grpc",
    ],
    "docs/cluster.md": [  # in tests/examples/test_cluster_page.py
        "torchrun --standalone --nproc-per-node 2 -m dlora simulate run.yaml",
        "torchrun --standalone --nproc-per-node 2 -m dlora simulate run.yaml --set",
        "torchrun --standalone --nproc-per-node 2 -m dlora peer run.yaml",
        "torchrun --standalone --nproc-per-node 2 --max-restarts 3",
    ],
    "docs/scripts.md": [  # in tests/examples/test_script_pages.py
        "trainer = SFTTrainer",
        "dlora local --peers 4",
        "dlora identity new north",
        "members: [north, south, west]",
        "import dlora",
        "state = peer.state_dict()",
        'checkpoint = torch.load("checkpoint.pt")',
        "DLORA_PEERS=peers.yaml",
    ],
    "docs/runs.md": ["peft: {peft_type: IA3"],
}
# Page -> first line -> why no test does it.
LEFT_OUT = {
    "README.md": {
        "trainer = SFTTrainer": "the same as docs/scripts.md shows",
        "pip install -e .": (
            "it installs; scripts/setup does the same, with .[dev,demo], before any test"
        ),
        "pip install torch --index-url": (
            "it downloads; tests/examples/test_setup.py has the address"
        ),
    },
    "CONTRIBUTING.md": {
        "scripts/setup": (
            "CI is scripts/check and scripts/test; the demo's parts are in the README's walk"
        )
    },
    "docs/privacy.md": {
        "DLORA_ASSETS=... python benchmarks/privacy.py": (
            "tests/examples/test_benchmarks.py runs it, small"
        )
    },
    "docs/peers.md": {"[Unit]": "a systemd unit; tests/run/test_peer.py has its shell line"},
    "docs/split.md": {
        "python examples/demo/collect.py": "the README's walk runs it; here the rows are made",
        "dlora identity new hub --role cloud --address hub.example.org": (
            "the first block with another address"
        ),
        "dlora device run.yaml --name phone --key phone.key --federation federation.yaml": (
            "a refusal; tests/run/test_device.py"
        ),
        "dlora device run.yaml --name phone --key phone.key --federation federation.yaml"
        " --set output_dir=run2": ("Ctrl-C and --resume; tests/run/test_device_faults.py"),
        "from datasets import load_dataset": (
            "a language model in a second cloud; tests/split/test_packed_rows.py trains so against"
            " PEFT"
        ),
        "dlora identity new tablet": (
            "three devices; tests/examples/test_phones_with_neighbours.py runs them"
        ),
        "[Unit]": "a systemd unit",
        "dlora cloud cloud.yaml --name hub --key hub.key --federation federation.yaml"
        " --set model=t5": ("a refusal; tests/split/test_split_torch.py has it"),
    },
    "docs/cluster.md": {
        "#!/bin/bash": "Slurm's batch script; there is no Slurm here",
        "apiVersion: v1": "Kubernetes; tests/examples/test_cluster_page.py reads it as YAML",
    },
    "docs/runs.md": {
        "generation: {scores": "tests/run/test_generation.py runs these keys",
        "LD_PRELOAD=": "the library is not on every machine; benchmarks/memory.py has it",
    },
    "docs/architecture.md": {"x_i += sum_j": "a formula", "y = W x": "a formula"},
}
