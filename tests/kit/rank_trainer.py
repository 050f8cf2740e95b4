"""One process of a site with two, for torchrun: transformers' Trainer, which makes it DDP."""

from __future__ import annotations

import os
import sys

import peft
import torch
import transformers

import dlora


def main(folder: str) -> None:
    """Train an adapter of a tiny llama; print what this process ends with."""
    transformers.set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=64, num_attention_heads=2, **shape)
    base = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, lora)
    index, rank = os.environ["DLORA_INDEX"], os.environ["RANK"]
    generator = torch.Generator().manual_seed(int(index))
    rows = [torch.randint(0, 64, (12,), generator=generator) for _ in range(32)]
    arguments = transformers.TrainingArguments(
        output_dir=f"{folder}/{index}",
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.add_callback(dlora.PeerCallback(every_steps=2))
    trainer.train()
    own = [value.double().sum() for value in peft.get_peft_model_state_dict(model).values()]
    sys.stdout.write(f"own {rank} {torch.stack(own).sum().item():.9f}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
