"""The model that a public checkpoint's config.json (or the header of a GGUF file) describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.catalog.backbones import OF_PUBLIC
from orchestrator.catalog.routers import DEEPSEEK, DENSE, OLMOE
from orchestrator.errors import SourceError
from orchestrator.spec.model import ModelSpec, MoESpec

# Fields of config.json that change what is computed, with the values that our models compute.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "clip_qkv": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu"),
}
_SUPPORTED_DEEPSEEK: dict[str, tuple[Any, ...]] = {
    "moe_layer_freq": (None, 1),
    "scoring_func": (None, "softmax"),
    "topk_method": (None, "greedy", "gready"),  # as the public config of 16B spells it
    "n_group": (None, 1),
    "topk_group": (None, 1),
    "q_lora_rank": (None,),
    "kv_lora_rank": (None,),
}
_SUPPORTED_QWEN: dict[str, tuple[Any, ...]] = {
    "qkv_bias": (False,),
    "use_sliding_window": (None, False),
    "decoder_sparse_step": (None, 1),
}
_SUPPORTED_OF = {"deepseek": _SUPPORTED_DEEPSEEK, "qwen2_moe": _SUPPORTED_QWEN}


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """Return the ModelSpec of a transformers config (olmoe, deepseek 16B, llama, our qwen2_moe), else SourceError."""
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or {}
    supported = {**_SUPPORTED, **_SUPPORTED_OF.get(str(kind), {})}
    unsupported = [f"{name} {config[name]!r}" for name, known in supported.items() if config.get(name) not in known]
    for scaling in (config.get("rope_scaling") or {}, rope):
        if (scaling.get("rope_type") or scaling.get("type") or "default") != "default":
            unsupported.append(f"rope scaling {scaling}")
    dense_layers = config.get("mlp_only_layers") or []
    if kind == "qwen2_moe" and dense_layers != list(range(len(dense_layers))):
        unsupported.append(f"mlp_only_layers {dense_layers}")
    backbone = OF_PUBLIC.get(str(kind))
    if backbone is None or unsupported:
        raise SourceError(
            f"a checkpoint of type {kind!r} cannot be imported",
            cause="; ".join(unsupported)
            or "known types are olmoe, deepseek (16B layout), llama, and qwen2_moe as moegrid exports it",
        )

    def number(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise SourceError(
                f"a checkpoint of type {kind!r} cannot be imported", cause=f"its config.json has {name} {value!r}"
            )
        return value

    shape: dict[str, Any] = {
        "hidden_size": number("hidden_size"),
        "num_layers": number("num_hidden_layers"),
        "num_heads": number("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads") or number("num_attention_heads"),
        "context": number("max_position_embeddings"),
        "vocab_size": number("vocab_size"),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "norm_eps": float(config.get("rms_norm_eps", backbone.public[str(kind)])),
        "init_std": float(config.get("initializer_range") or 0.02),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if kind == "llama":
        moe = MoESpec(preset=DENSE, top_k=1, num_experts=1, expert_width=number("intermediate_size"))
        return ModelSpec(backbone=backbone.name, moe=moe, **shape)
    if kind == "olmoe":
        moe = MoESpec(
            preset=OLMOE,
            top_k=number("num_experts_per_tok"),
            num_experts=number("num_experts"),
            expert_width=number("intermediate_size"),
            renormalise=bool(config.get("norm_topk_prob", False)),
        )
        return ModelSpec(backbone=backbone.name, moe=moe, **shape)
    if kind == "qwen2_moe":
        moe = MoESpec(
            preset=DEEPSEEK,
            top_k=number("num_experts_per_tok"),
            num_experts=number("num_experts"),
            shared_experts=number("shared_expert_intermediate_size") // number("moe_intermediate_size"),
            expert_width=number("moe_intermediate_size"),
            renormalise=bool(config.get("norm_topk_prob", False)),
        )
        width = number("intermediate_size") if dense_layers else 0
        layers = len(dense_layers)
        return ModelSpec(backbone=backbone.name, dense_layers=layers, dense_width=width, moe=moe, **shape)
    moe = MoESpec(
        preset=DEEPSEEK,
        top_k=number("num_experts_per_tok"),
        num_experts=number("n_routed_experts"),
        shared_experts=config.get("n_shared_experts") or 0,
        expert_width=number("moe_intermediate_size"),
        renormalise=bool(config.get("norm_topk_prob", False)),
        routed_scaling=float(config.get("routed_scaling_factor") or 1.0),
    )
    dense = config.get("first_k_dense_replace", 0)
    width = number("intermediate_size")
    return ModelSpec(backbone=backbone.name, dense_layers=dense, dense_width=width, moe=moe, **shape)
