"""TRL's DPOTrainer in bfloat16 as one of several peers, for `dlora local`."""

from __future__ import annotations

import os
import sys

import datasets
import peft
import transformers
import trl

import dlora

WORDS = ("fox", "dog", "cat", "bird")


def main(output_dir: str) -> None:
    """Eight steps on preferences of this site, mixed every two."""
    index = int(os.environ["DLORA_INDEX"])
    rows = [
        {
            "prompt": f"The {WORDS[(number + index) % 4]} went",
            "chosen": " home happily.",
            "rejected": " away and cried.",
        }
        for number in range(40)
    ]
    transformers.set_seed(0)
    trainer = trl.DPOTrainer(
        model=os.environ["DLORA_ASSETS"] + "/models/stories260K/hf",
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
        args=trl.DPOConfig(
            output_dir=f"{output_dir}/{index}",
            max_steps=8,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            bf16=True,
            max_length=64,
        ),
    )
    trainer.add_callback(dlora.PeerCallback(every_steps=2))
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
