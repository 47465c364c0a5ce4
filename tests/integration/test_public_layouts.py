"""Public layouts: what transformers writes is read by its config alone, computes the same, and goes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from jobs.models.convert import export_checkpoint, import_checkpoint
from jobs.models.weights import weights_sha256
from orchestrator.plan.cost import parameters
from orchestrator.spec.public_config import spec_of
from orchestrator.spec.resolve import resolve_model
from tests.public_models import IDS, VOCAB

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
# Heads do not make up the residual stream: 4 x 16 and 4 x 20 against 48.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"intermediate_size": 80, "head_dim": 16, "attention_bias": True}),
    "mistral": ("Mistral", {"intermediate_size": 80, "head_dim": 20, "sliding_window": None}),
    "qwen2": ("Qwen2", {"intermediate_size": 80, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"intermediate_size": 80, "head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 40, "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2},
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
    "qwen3_moe (weights as they are)": (
        "Qwen3Moe",
        {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
}


@torch.no_grad()
def difference(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    """Return the largest difference, relative to the largest value where that is above 1."""
    assert ours is not None
    assert theirs is not None
    return float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_a_public_checkpoint_comes_in_and_goes_back(name: str, tmp_path: Path) -> None:
    family, own = LAYOUTS[name]
    torch.manual_seed(0)
    reference = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**COMMON, **own)
    ).eval()
    for key, parameter in reference.named_parameters():
        if key.endswith(("bias", "norm.weight")):  # zeros and ones would hide that they are not read
            parameter.copy_(torch.randn_like(parameter) * 0.3 + float(key.endswith("norm.weight")))
    reference.save_pretrained(tmp_path / "theirs")
    expected = reference(input_ids=IDS).logits

    model = import_checkpoint(tmp_path / "theirs").eval()
    assert difference(model(IDS).logits, expected) <= 1e-5
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    counted = parameters(resolve_model(spec_of(config)), VOCAB)
    assert counted.total == sum(parameter.numel() for parameter in reference.parameters())

    export_checkpoint(model, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert difference(again(input_ids=IDS).logits, expected) <= 1e-5
    assert weights_sha256(import_checkpoint(tmp_path / "ours")) == weights_sha256(model)


def test_a_cache_and_grouped_heads_of_any_width_agree_with_one_pass(tmp_path: Path) -> None:
    family, own = LAYOUTS["qwen3_moe"]
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**COMMON, **own)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    model = import_checkpoint(tmp_path).eval()
    whole = model(IDS).logits
    first = model(IDS[:, :5], use_cache=True)
    assert first.logits is not None
    rest = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert difference(torch.cat([first.logits, rest.logits], 1), whole) <= 1e-5
