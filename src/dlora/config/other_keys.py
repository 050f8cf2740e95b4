"""Keys of other tools: their names in dlora's config, and which have no counterpart."""

from __future__ import annotations

# A key of TRL, PEFT, transformers or Axolotl -> what to write instead. Keys of dlora's config are
# in backticks.
ADVICE = {
    "max_steps": "a run has `train.rounds` times `train.local_steps` steps; set these",
    "num_train_epochs": (
        "passes are counted between two exchanges: set `train.local_epochs` and `train.rounds`"
    ),
    "epochs": (
        "passes are counted between two exchanges: set `train.local_epochs` and `train.rounds`"
    ),
    "num_epochs": (
        "passes are counted between two exchanges: set `train.local_epochs` and `train.rounds`"
    ),
    "attn_implementation": (
        "there is no such choice: attention is what the model's own config and the device give;"
        " remove it"
    ),
    "packing": "rows are never packed together; `data.max_length` bounds one row; remove it",
    "sample_packing": "rows are never packed together; `data.max_length` bounds one row; remove it",
    "completion_only_loss": "the loss is always on the answers only; remove it",
    "assistant_only_loss": "the loss is always on the answers only; remove it",
    "train_on_inputs": "the loss is always on the answers only; remove it",
    "max_seq_length": "it is called `data.max_length`",
    "sequence_len": "it is called `data.max_length`",
    "model_max_length": "it is called `data.max_length`",
    "dataset_text_field": "it is called `data.text`; causal-lm reads the column text",
    "max_train_samples": "it is called `data.limit`",
    "max_eval_samples": "it is called `data.eval_limit`",
    "dataset": "give files as `data.train` and `data.eval`",
    "datasets": "give files as `data.train` and `data.eval`",
    "train_file": "it is called `data.train`",
    "validation_file": "it is called `data.eval`",
    "model_name_or_path": "it is called `model`",
    "base_model": "it is called `model`",
    "lr": "it is called `train.learning_rate`",
    "optim": "it is called `train.optimizer`: adamw or sgd",
    "batch_size": "it is called `train.per_device_train_batch_size`",
    "micro_batch_size": "it is called `train.per_device_train_batch_size`",
    "warmup_ratio": "give the local steps themselves: `train.warmup_steps`",
    "rank": "it is called `lora.r`",
    "lora_r": "it is called `lora.r`",
    "alpha": "it is called `lora.lora_alpha`",
    "dropout": "it is called `lora.lora_dropout`; the frozen model's is `train.model_dropout`",
    "lora_target_modules": "it is called `lora.target_modules`",
    "bf16": "set `dtype` to bfloat16",
    "fp16": "float16 does not exist here; set `dtype` to bfloat16",
    "torch_dtype": "it is called `dtype`: float32 or bfloat16",
    "load_in_4bit": "set `quantization` to nf4",
    "load_in_8bit": "set `quantization` to int8",
    "eval_steps": "it is counted in rounds: `eval_every`",
    "eval_strategy": "it is counted in rounds: `eval_every`",
    "save_steps": "it is counted in rounds: `save_every`",
    "save_strategy": "it is counted in rounds: `save_every`",
    "logging_steps": "every round is logged; remove it",
    "report_to": (
        "the log is `output_dir`/log.jsonl, the report beside it; nothing is sent anywhere;"
        " remove it"
    ),
    "push_to_hub": "nothing is sent anywhere; upload the adapter folder in `output_dir` yourself",
    "resume_from_checkpoint": "give --resume on the command line",
    "fsdp": "it is called `shard_model`: true",
    "deepspeed": "a run has one device a process; remove it",
    "num_peers": "it is called `peers.count`, or name them in `peers.members`",
    "clients": "it is called `peers.count`, or name them in `peers.members`",
    "trust_remote_code": "code of a model folder is never run; remove it",
}

# Keys that only one of the two kinds of config has. They help to say that a program got the config
# of the other kind.
OF_A_RUN = frozenset(
    {
        "task",
        "pooling",
        "shard_model",
        "peft",
        "lora",
        "bottleneck",
        "data",
        "train",
        "peers",
        "schedule",
        "split",
        "generation",
        "eval_every",
        "eval_peers",
        "eval_peers_every",
    }
    | {"per_device_eval_batch_size", "save_every", "compare", "seed", "output_dir"}
)
OF_A_CLOUD = frozenset({"core", "limits", "listen", "metrics"})
