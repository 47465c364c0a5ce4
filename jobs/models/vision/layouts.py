"""The names that public checkpoints give an encoder's weights, by ours."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.spec.vision import EncoderSpec

# Ours -> theirs in one layer, each with .weight and .bias.
_DINOV2_LAYER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "attention_norm": "norm1",
    "block_norm": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_SIGLIP_LAYER = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.out_proj",
    "attention_norm": "layer_norm1",
    "block_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def dinov2(spec: EncoderSpec) -> Mapping[str, str]:
    """Return ours -> theirs as in transformers' Dinov2Model."""
    names = {
        "positions": "embeddings.position_embeddings",
        "class_token": "embeddings.cls_token",
        **_pair("patches", "embeddings.patch_embeddings.projection"),
        **_pair("norm", "layernorm"),
        **_layers(spec, _DINOV2_LAYER, "encoder.layer"),
    }
    for layer in range(spec.num_layers):
        names[f"layers.{layer}.attention_scale"] = f"encoder.layer.{layer}.layer_scale1.lambda1"
        names[f"layers.{layer}.block_scale"] = f"encoder.layer.{layer}.layer_scale2.lambda1"
    return names


def siglip(spec: EncoderSpec) -> Mapping[str, str]:
    """Return ours -> theirs as in transformers' SiglipVisionModel, whose pooling head is left out."""
    return {
        "positions": "embeddings.position_embedding.weight",
        **_pair("patches", "embeddings.patch_embedding"),
        **_pair("norm", "post_layernorm"),
        **_layers(spec, _SIGLIP_LAYER, "encoder.layers"),
    }


def _pair(own: str, theirs: str) -> dict[str, str]:
    return {f"{own}.{leaf}": f"{theirs}.{leaf}" for leaf in ("weight", "bias")}


def _layers(spec: EncoderSpec, table: Mapping[str, str], prefix: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for layer in range(spec.num_layers):
        for own, theirs in table.items():
            if own in ("up", "down"):  # the dense block's own names
                names[f"layers.{layer}.block.ffn.{own}"] = f"{prefix}.{layer}.{theirs}.weight"
                names[f"layers.{layer}.block.ffn.{own}_bias"] = f"{prefix}.{layer}.{theirs}.bias"
            else:
                names |= _pair(f"layers.{layer}.{own}", f"{prefix}.{layer}.{theirs}")
    return names
