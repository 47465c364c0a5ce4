"""Tiny checkpoints in every public layout that is read and written, with random weights, written by transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.public_models import VOCAB

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 6.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
# A head of 12 turns in six pairs.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.1, 2.8],
    "long_factor": [1.2, 1.9, 3.5, 4, 7.5, 9.0],
}
DEEPSEEK = {
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
LATENT = {
    "kv_lora_rank": 20,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}
# Heads do not make up the residual stream: 4 x 16 and 4 x 20 against 48.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"intermediate_size": 80, "head_dim": 16, "attention_bias": True}),
    "mistral": ("Mistral", {"intermediate_size": 80, "head_dim": 20, "sliding_window": None}),
    "qwen2": ("Qwen2", {"intermediate_size": 80, "head_dim": 10, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"intermediate_size": 80, "head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 40, "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "mixtral (one expert a token)": (
        "Mixtral",
        {"intermediate_size": 40, "num_local_experts": 5, "num_experts_per_tok": 1},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "head_dim": 20,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "qkv_bias": True,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "intermediate_size": 40,
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "rope_parameters": {**YARN, "factor": 8.0, "truncate": False},
            "swiglu_limit": 1.5,
        },
    ),
    "gpt_oss (without windows)": (
        "GptOss",
        {
            "intermediate_size": 40,
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "full_attention"],
            "attention_bias": False,
        },
    ),
    "glm4_moe": ("Glm4Moe", {**DEEPSEEK, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "granitemoe": (
        "GraniteMoe",
        {
            "intermediate_size": 24,
            "num_local_experts": 6,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.3,
            "logits_scaling": 2.5,
        },
    ),
    "flex_olmo": (
        "FlexOlmo",
        {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2", {**DEEPSEEK, **LATENT, "q_lora_rank": None, "n_shared_experts": 2}),
    "deepseek_v2 (groups, stretched)": (
        "DeepseekV2",
        {
            **DEEPSEEK,
            **LATENT,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**YARN, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            **LATENT,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {**YARN, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "llama (stretched as Llama 3.1)": ("Llama", {"intermediate_size": 80, "rope_parameters": LLAMA3}),
    "glm4_moe (stretched as Llama 3.1)": (
        "Glm4Moe",
        {**DEEPSEEK, "head_dim": 20, "rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.4}},
    ),
    "mixtral (stretched evenly)": (
        "Mixtral",
        {
            "intermediate_size": 40,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
        },
    ),
    # Beyond its context the base of the positions grows.
    "qwen2 (longer than its context)": (
        "Qwen2",
        {
            "intermediate_size": 80,
            "max_position_embeddings": 13,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 3.0},
        },
    ),
    # Beyond its original context all positions turn by other frequencies.
    "phi3 (longer than its context)": (
        "Phi3",
        {"intermediate_size": 80, "original_max_position_embeddings": 13, "rope_parameters": LONGROPE},
    ),
    "phi3 (within its original context)": (
        "Phi3",
        {
            "intermediate_size": 80,
            "original_max_position_embeddings": 90,
            "max_position_embeddings": 90,
            "sliding_window": 7,
            "rope_parameters": {**LONGROPE, "factor": 4.0},
        },
    ),
    "phi3 (a part of each head turns)": (
        "Phi3",
        {
            "intermediate_size": 80,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "llama (LongRoPE, longer than its context)": (
        "Llama",
        {
            "intermediate_size": 80,
            "attention_bias": True,
            "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 11, "attention_factor": 1.3},
        },
    ),
    "olmoe (biases)": (
        "Olmoe",
        {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 1, "attention_bias": True},
    ),
    "qwen3 (biases)": ("Qwen3", {"intermediate_size": 80, "head_dim": 20, "attention_bias": True}),
    "qwen3_moe (biases)": (
        "Qwen3Moe",
        {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "attention_bias": True},
    ),
    "qwen2_moe (a shared expert of any width)": (
        "Qwen2Moe",
        {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 41,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "qkv_bias": False,
            "head_dim": 8,
        },
    ),
    "mistral (windows)": ("Mistral", {"intermediate_size": 80, "head_dim": 20, "sliding_window": 6}),
    "qwen3_moe (weights as they are)": (
        "Qwen3Moe",
        {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
}


@torch.no_grad()
def written(name: str, folder: Path, **changes: object) -> Any:
    """Return the model of transformers that is written to `folder`, in evaluation mode."""
    family, own = LAYOUTS[name]
    torch.manual_seed(0)
    # Some configurations write into the mappings that they are given.
    fields = copy.deepcopy({**COMMON, **own, **changes})
    reference = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**fields)).eval()
    for key, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
        # Zeros and ones would hide that they are not read.
        if key.endswith(("bias", "norm.weight", "sinks")):
            tensor.copy_(torch.randn_like(tensor) * 0.3 + float(key.endswith("norm.weight")))
    reference.save_pretrained(folder)
    return reference
