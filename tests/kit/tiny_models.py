"""Tiny randomly initialised models of every family, with a tokenizer, as folders `from_pretrained`
loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    "the", "a", "good", "bad", "fine", "awful", "film", "play",
    "book", "was", "is", "very", "not", "quite", "and", "but",
]  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_VOCABULARY = len(SPECIAL) + len(WORDS)


def config(family: str) -> transformers.PretrainedConfig:
    """Two layers of width 64 (a block of nf4); dropout 0.1, so that runs must switch it off to
    match.
    """
    encoder: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        # at the usual 0.02 nothing so small passes any signal on; updates drown in rounding
        "initializer_range": 0.2,
    }
    match family:
        case "bert":
            return transformers.BertConfig(**encoder, pad_token_id=0)
        case "roberta":
            return transformers.RobertaConfig(**encoder, pad_token_id=0, max_position_embeddings=64)
        case "llama":  # grouped queries: 4 heads, 2 of keys and values
            return transformers.LlamaConfig(
                **encoder, num_key_value_heads=2, attention_dropout=0.1, tie_word_embeddings=False
            )
        case "opt":
            return transformers.OPTConfig(
                vocab_size=_VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                ffn_dim=128,
                word_embed_proj_dim=64, init_std=0.2, max_position_embeddings=64,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=_VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64,
                initializer_range=0.2,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
    raise ValueError(family)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One word, one token."""
    numbered = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def save_model(folder: Path, family: str, task: str = "classification") -> Path:
    """A whole checkpoint: everything for causal-lm, else the body (its head is new, as in life)."""
    factory = transformers.AutoModelForCausalLM if task == "causal-lm" else transformers.AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(7)
        factory.from_config(config(family)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentence(index: int) -> tuple[str, int]:
    """Text number ``index`` and its class: whether a kind or an unkind word stands in it."""
    kind = index % 2
    words = [WORDS[index // 2 % 2], WORDS[6 + index % 3], "was", *(["very"] * (index // 2 % 4))]
    return " ".join([*words, ["bad", "awful", "good", "fine"][2 * kind + index // 4 % 2]]), kind


def write_rows(path: Path, count: int, task: str = "classification", start: int = 0) -> Path:
    """``count`` rows as jsonl; from 64 on they are for scoring, and none of them is among those
    before.
    """
    rows: list[dict[str, Any]] = []
    for index in range(start, start + count):
        text, kind = sentence(index)
        text = text.replace(" was ", " is ") if start >= 64 else text
        match task:
            case "classification":
                rows.append({"text": text, "label": kind})
            case "regression":  # how kind, and a little how long
                rows.append({"text": text, "label": 2 * kind + len(text.split()) / 8})
            case "multi-label":
                said = {"kind": kind, "film": "film" in text, "very": "very" in text}
                rows.append({"text": text, "label": [name for name in said if said[name]]})
            case "token-classification":  # what is judged, and how
                marks = dict.fromkeys(("film", "play", "book"), "B-THING")
                marks |= {"very": "B-HOW"} | dict.fromkeys(("good", "bad", "awful"), "I-HOW")
                tags = [marks.get(word, "O") for word in text.split()]
                rows.append({"text": text.split(), "label": tags})
            case _:
                rows.append({"text": f"{text} {text}"})
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
