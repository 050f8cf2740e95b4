"""TRL's SFTTrainer on dolly: an ordinary script, and the one line that makes it a peer.

The folder of data and models comes from DLORA_ASSETS. For example, with four sites on this machine:

    dlora local --peers 4 --rounds 3 examples/trl-sft/sft.py -- --max-steps 60
"""

import argparse
import os
from pathlib import Path

import datasets
import peft
import transformers
from trl import SFTConfig, SFTTrainer

import dlora

parser = argparse.ArgumentParser()
parser.add_argument("--output-dir", default="runs/trl-sft")
parser.add_argument("--max-steps", type=int, default=60)
parser.add_argument("--rows", type=int, default=400, help="rows of this site")
arguments = parser.parse_args()

assets = Path(os.environ["DLORA_ASSETS"])
index, count = int(os.environ.get("DLORA_INDEX", "0")), int(os.environ.get("DLORA_COUNT", "1"))

# Each site has answers of its own length: the rows in the order of their answer's length, in parts.
rows = datasets.load_dataset(
    "json", data_files=str(assets / "data/instruct/dolly15k/dolly15k.jsonl.gz"), split="train"
)
rows = rows.map(lambda row: {"length": len(row["response"])})
rows = rows.sort("length").shard(num_shards=count, index=index, contiguous=True)
rows = rows.select(range(min(arguments.rows, len(rows))))
rows = rows.map(
    lambda row: {"prompt": row["instruction"] + "\n", "completion": row["response"]},
    remove_columns=rows.column_names,
)

transformers.set_seed(0)  # before the adapter is made: all sites begin with the same values
trainer = SFTTrainer(
    model=str(assets / "models/stories260K/hf"),
    train_dataset=rows,
    peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir=f"{arguments.output_dir}/site-{index}",
        max_steps=arguments.max_steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        max_length=256,
        logging_steps=10,
        save_steps=20,
        report_to=[],
        use_cpu=True,
    ),
)
trainer.add_callback(dlora.PeerCallback(every_steps=20))  # the line that makes it a peer
trainer.train()
