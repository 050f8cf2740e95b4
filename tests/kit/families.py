"""Tiny random models of every architecture that transformers knows, made from its own defaults made
small.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from dlora.config.training import LoraSection
from dlora.data.formats import Example
from dlora.lora.stacked import StackedModel, attach
from dlora.model.load import FrozenModel

VOCABULARY = 24
NAMES = {
    "classification": tuple(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "causal-lm": tuple(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}
_SIZES: dict[int, str] = {  # size -> the keys that get it, where their default is larger
    VOCABULARY: "vocab_size entity_vocab_size",
    32: (
        "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim"
        " decoder_hidden_size lru_width attention_hidden_size hidden_size_per_layer_input d_latents"
        " entity_emb_size model_dim"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"
        " num_decoder_layers num_experts_per_tok moe_topk moe_top_k moe_k num_key_value_heads"
        " num_kv_heads type_vocab_size n_shared_experts num_self_attends_per_block n_group"
        " topk_group num_blocks first_k_dense_replace"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads"
        " decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts"
        " num_decoder_attention_heads attention_window num_latents linear_num_value_heads"
        " linear_num_key_heads index_n_heads mamba_n_heads"
    ),
    8: (
        "head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank q_lora_rank"
        " rotary_dim time_step_rank state_size mamba_d_state linear_key_head_dim"
        " linear_value_head_dim attention_head_size index_head_dim"
    ),
    64: (
        "intermediate_size ffn_dim d_ff d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size"
        " moe_intermediate_size shared_expert_intermediate_size max_position_embeddings n_positions"
        " ffn_size intermediate_dim n_inner dense_intermediate_size"
        " moe_shared_expert_intermediate_size max_2d_position_embeddings"
    ),
}
_SIZE = {key: size for size, keys in _SIZES.items() for key in keys.split()}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_OTHERWISE: dict[str, dict[str, Any]] = {  # what the defaults hide, or what does not fit small
    "t5": {"decoder_start_token_id": 0},  # as every checkpoint has it
    "mt5": {"decoder_start_token_id": 0},
    "umt5": {"decoder_start_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX"},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 8,
    },
}


_FOUR_LAYERS = {  # of which only some have attention, without which there is no cache
    *(
        "jamba",
        "qwen3_5",
        "qwen3_5_text",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_next",
        "qwen4_exp",
        "qwen4_exp_text",
    ),
    *("bailing_hybrid", "kimi_linear", "lfm3", "recurrent_gemma", "bamba", "granitemoehybrid"),
}


def tiny_config(model_type: str) -> Any:
    """The architecture's configuration, small."""
    return _small(transformers.CONFIG_MAPPING[model_type], model_type)


def _small(kind: Any, model_type: str) -> Any:
    default = kind()
    known = default.to_dict()
    keys: dict[str, Any] = {key: number for key, number in _IDS.items() if key in known}
    for key, size in _SIZE.items():
        value = known.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > size:
            keys[key] = size
    for key in ("initializer_range", "init_std", "initializer_factor"):
        if key in known and model_type not in ("t5",):
            keys[key] = 0.2
    if "kv_lora_rank" in known:  # every head reads its own part of one latent
        keys["num_key_value_heads"] = 4
    for key, size in (("head_dim", 8), ("num_key_value_heads", 2), ("vocab_size", VOCABULARY)):
        if key in known and known[key] is None:
            keys[key] = size
    if model_type in _FOUR_LAYERS:
        keys["num_hidden_layers"] = 4
    chances = [
        key
        for key, value in known.items()
        if ("drop" in key or "jitter" in key) and isinstance(value, float)
    ]
    keys |= dict.fromkeys(chances, 0.0)
    for name in getattr(kind, "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if part is not None:
            keys[name] = _small(type(part), part.model_type).to_dict()
    return kind(**keys | _OTHERWISE.get(model_type, {}))


def tiny_model(model_type: str, task: str) -> StackedModel:
    """A random model with adapters on all linears of its blocks; everything as dlora attaches
    it.
    """
    config = tiny_config(model_type)
    if task == "classification":
        config.num_labels = 2
        factory: Any = transformers.AutoModelForSequenceClassification
    else:
        factory = transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = factory.from_config(config)
    network.requires_grad_(False)
    body = network.base_model_prefix
    head = [
        name
        for name, child in network.named_children()
        if name != body and any(True for _ in child.parameters())
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lora.target_modules all-linear reaches")
        return attach(
            FrozenModel(network, "tiny", tuple(head) if task == "classification" else ()),
            LoraSection(r=4),
            task,
            0,
        )


def rows(task: str, num_participants: int, num_rows: int = 2) -> list[list[Example]]:
    """``num_rows`` of each participant, of unequal length."""
    generator = torch.Generator().manual_seed(3)

    def row(number: int) -> Example:
        words = torch.randint(3, VOCABULARY, (8 + number % 3,), generator=generator).tolist()
        ids = [1, *words, 2]
        return Example(ids, number % 2 if task == "classification" else ids)

    return [
        [row(participant + index) for index in range(num_rows)]
        for participant in range(num_participants)
    ]
