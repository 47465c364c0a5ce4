"""Small public checkpoints with random weights, written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

VOCAB = 70
IDS = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}


def olmoe_in(folder: Path) -> OlmoeForCausalLM:
    """Return the model that is written to `folder`."""
    torch.manual_seed(0)
    config = OlmoeConfig(**SHAPE, intermediate_size=24, num_experts=8, num_experts_per_tok=3, rope_parameters=None)
    model = OlmoeForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def llama_in(folder: Path) -> LlamaForCausalLM:
    """Return the model that is written to `folder`."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, intermediate_size=48, tie_word_embeddings=True, rms_norm_eps=1e-5)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model
