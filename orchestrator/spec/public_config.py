"""The model that a public checkpoint's config.json (or the header of a GGUF file) describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.catalog.backbones import OF_PUBLIC
from orchestrator.catalog.routers import DENSE
from orchestrator.errors import SourceError
from orchestrator.spec import public_blocks as blocks
from orchestrator.spec.attention import LatentSpec, MultiplierSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.public_blocks import Config, Fields
from orchestrator.spec.public_rope import rope_of, rope_theta, rotary_fraction
from orchestrator.spec.resolve import resolve_moe

# Values of a field of config.json that our models compute.
Supported = Mapping[str, tuple[object, ...]]
_ALL: Supported = {
    "clip_qkv": (None,),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu"),
    "quantization_config": (None,),
}
_PLAIN: Supported = {"attention_bias": (None, False)}
_SPARSE: Supported = {"decoder_sparse_step": (None, 1), "use_sliding_window": (None, False)}
_DEEPSEEK: Supported = {
    "moe_layer_freq": (None, 1),
    "scoring_func": (None, "softmax"),
    "topk_method": (None, "greedy", "gready"),  # as the public config of 16B spells it
    "n_group": (None, 1),
    "topk_group": (None, 1),
    "q_lora_rank": (None,),
    "kv_lora_rank": (None,),
}
_DEEPSEEK_V2: Supported = {
    "moe_layer_freq": (None, 1),
    "scoring_func": (None, "softmax"),
    "topk_method": (None, "greedy", "group_limited_greedy"),
    "norm_topk_prob": (None, False),
}
_DEEPSEEK_V3: Supported = {
    "moe_layer_freq": (None, 1),
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
}
_LLAMA_MOE: Supported = {
    "gate_type": (None, "TopKBalancedNoisyGate"),
    "gate_network": (None, "mlp"),
    "gate_use_softmax": (None, True),
    "calculator_type": (None, "UniversalCalculator"),
    "multiply_gate_scores": (None, True),
    "add_weight_norm": (None, False),
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """A `model_type`: its block, what else it says, and what of its config.json we compute.

    `defaults` are what its class takes for fields that a config.json does not have.
    """

    moe: Callable[[Config], MoESpec]
    more: Callable[[Config], Mapping[str, object]] = lambda config: {}
    supported: Supported = field(default_factory=dict)
    defaults: Fields = field(default_factory=dict)


def _leading_dense(config: Config) -> Mapping[str, object]:
    layers = config.leading_dense()
    return {"dense_layers": layers, "dense_width": config.number("intermediate_size") if layers else 0}


def _first_dense(config: Config) -> Mapping[str, object]:
    layers = config.fields.get("first_k_dense_replace", 0)
    return {"dense_layers": layers, "dense_width": config.number("intermediate_size") if layers else 0}


def _latent(config: Config) -> Mapping[str, object]:
    """Return what multi-head latent attention is made of; heads of queries, keys and values are as many."""
    latent = LatentSpec(
        kv_rank=config.number("kv_lora_rank"),
        q_rank=config.fields.get("q_lora_rank") or 0,
        plain_dim=config.number("qk_nope_head_dim"),
        rotary_dim=config.number("qk_rope_head_dim"),
        value_dim=config.number("v_head_dim"),
    )
    interleaved = bool(config.fields.get("rope_interleave", True))
    rope = replace(rope_of(config.fields), interleaved=interleaved)
    return {"latent": latent, "rope": rope, "head_dim": 0, **_first_dense(config)}


def _glm4_moe(config: Config) -> Mapping[str, object]:
    return {
        "rope": replace(rope_of(config.fields), fraction=rotary_fraction(config.fields)),
        "qk_norm": "head" if config.flag("use_qk_norm") else "",
        "attention_bias": "qkv" if config.flag("attention_bias") else "",
        **_first_dense(config),
    }


def _granite(config: Config) -> Mapping[str, object]:
    names = {
        "embedding": "embedding_multiplier",
        "attention": "attention_multiplier",
        "residual": "residual_multiplier",
        "logits": "logits_scaling",
    }
    multipliers = {ours: float(config.fields.get(its) or 1.0) for ours, its in names.items()}
    return {"multipliers": MultiplierSpec(**multipliers), **_all_biases(config)}


def _phi3(config: Config) -> Mapping[str, object]:
    rope = replace(rope_of(config.fields), fraction=rotary_fraction(config.fields))
    # A window that is wider than the context cuts nothing.
    window = config.fields.get("sliding_window") or 0
    return {"rope": rope, "attention_window": window if window < config.number("max_position_embeddings") else 0}


def _all_biases(config: Config) -> Mapping[str, object]:
    return {"attention_bias": "all" if config.flag("attention_bias") else ""}


def _window(config: Config) -> Mapping[str, object]:
    """Return the window of a model all of whose layers have it."""
    return {"attention_window": config.fields.get("sliding_window") or 0}


def _windows(config: Config) -> Mapping[str, object]:
    """Return the window that `layer_types` gives to all layers but each n-th. Raises SourceError for another order."""
    kinds, layers = config.fields.get("layer_types"), config.number("num_hidden_layers")
    window = config.fields.get("sliding_window") or 0
    if kinds is None and config.fields.get("model_type") == "gpt_oss":
        kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    if kinds is None or "sliding_attention" not in kinds or not window:
        return {}
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    ordered = [
        "full_attention" if every and layer % every == every - 1 else "sliding_attention" for layer in range(layers)
    ]
    if kinds != ordered:
        raise SourceError(
            f"a checkpoint of type {config.fields.get('model_type')!r} cannot be imported", cause=f"layer_types {kinds}"
        )
    return {"attention_window": window, "full_every": every}


_EPS5, _EPS6 = {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}
# What GPT-OSS stretches its positions by, where nothing is said of them.
_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
LAYOUTS: Mapping[str, _Layout] = {
    "olmoe": _Layout(blocks.olmoe, more=_all_biases, defaults=_EPS5),
    "llama": _Layout(blocks.dense, more=_all_biases, defaults=_EPS6),
    "llama_moe": _Layout(blocks.llama_moe, supported={**_PLAIN, **_LLAMA_MOE}, defaults=_EPS6),
    "mistral": _Layout(
        blocks.dense, more=_window, defaults={**_EPS6, "num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "qwen2": _Layout(
        blocks.dense,
        more=lambda config: {"attention_bias": "qkv"},
        supported=_SPARSE,
        defaults={**_EPS6, "num_key_value_heads": 32},
    ),
    "qwen3": _Layout(
        blocks.dense,
        more=lambda config: {"qk_norm": "head", **_all_biases(config)},
        supported=_SPARSE,
        defaults={**_EPS6, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "phi3": _Layout(
        blocks.dense, more=_phi3, supported=_PLAIN, defaults={**_EPS5, "original_max_position_embeddings": 4096}
    ),
    "mixtral": _Layout(
        blocks.mixtral,
        more=_window,
        supported={"router_jitter_noise": (None, 0.0)},
        defaults={**_EPS5, "num_key_value_heads": 8, "rope_theta": 1e6},
    ),
    "granitemoe": _Layout(blocks.mixtral, more=_granite, defaults=_EPS6),
    "flex_olmo": _Layout(
        blocks.olmoe,
        more=lambda config: {"norm_order": "post", **_all_biases(config)},
        defaults={**_EPS6, "rope_theta": 5e5},
    ),
    "gpt_oss": _Layout(
        blocks.gpt_oss,
        more=lambda config: {"attention_sinks": True, **_all_biases(config), **_windows(config)},
        defaults={
            **_EPS5,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "attention_bias": True,
            "rope_theta": 150000.0,
            "rope_parameters": _OSS_ROPE,
        },
    ),
    "glm4_moe": _Layout(
        blocks.deepseek_v3,
        more=_glm4_moe,
        defaults={
            **_EPS5,
            "num_key_value_heads": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "partial_rotary_factor": 0.5,
        },
    ),
    "deepseek_v2": _Layout(
        blocks.deepseek_v2,
        more=_latent,
        supported={**_PLAIN, **_DEEPSEEK_V2},
        defaults={**_EPS6, "n_shared_experts": 2, "q_lora_rank": 1536},
    ),
    "deepseek_v3": _Layout(
        blocks.deepseek_v3,
        more=_latent,
        supported={**_PLAIN, **_DEEPSEEK_V3},
        defaults={
            **_EPS6,
            "num_key_value_heads": 128,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "q_lora_rank": 1536,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": _Layout(
        blocks.qwen3_moe,
        more=lambda config: {"qk_norm": "head", **_all_biases(config), **_leading_dense(config)},
        supported=_SPARSE,
        defaults={**_EPS6, "num_key_value_heads": 4},
    ),
    "qwen2_moe": _Layout(
        blocks.qwen2_moe,
        more=lambda config: {"attention_bias": "qkv" if config.flag("qkv_bias") else "", **_leading_dense(config)},
        supported={**_PLAIN, **_SPARSE},
        defaults={**_EPS6, "num_key_value_heads": 16, "qkv_bias": True},
    ),
    "deepseek": _Layout(
        blocks.deepseek,
        more=lambda config: {
            "dense_layers": config.fields.get("first_k_dense_replace", 0),
            "dense_width": config.number("intermediate_size"),
        },
        supported={**_PLAIN, **_DEEPSEEK},
        defaults=_EPS6,
    ),
}


_OF_HEADS = "its attention is a mixture of experts too (MoA), ours is not; docs/models.md has the parts of its blocks"
# Types whose blocks we compute, and what of them we do not.
_BEYOND: Mapping[str, str] = {
    "jetmoe": _OF_HEADS,
    "moduleformer": _OF_HEADS,
    "phimoe": "its norms have means and biases, its head has biases",
}


def spec_of(config: Fields) -> ModelSpec:
    """Return the ModelSpec of a transformers config of one of `LAYOUTS`. Raises SourceError with what is beyond it."""
    kind = str(config.get("model_type"))
    layout, backbone = LAYOUTS.get(kind), OF_PUBLIC.get(kind)
    if layout is None or backbone is None:
        why = _BEYOND.get(kind) or f"known types are {', '.join(LAYOUTS)} (deepseek: 16B)"
        raise SourceError(f"a checkpoint of type {kind!r} cannot be imported", cause=why)
    config = {**layout.defaults, **config}
    supported = {**_ALL, **layout.supported}
    unsupported = [f"{name} {config[name]!r}" for name, known in supported.items() if config.get(name) not in known]
    if kind not in ("glm4_moe", "phi3") and (fraction := rotary_fraction(config)) != 1.0:
        unsupported.append(f"partial_rotary_factor {fraction}")
    sliding = {"sliding_attention"} if kind == "gpt_oss" else set()
    if others := set(config.get("layer_types") or ()) - {"full_attention"} - sliding:
        unsupported.append(f"layer_types {sorted(others)}")
    if unsupported:
        raise SourceError(f"a checkpoint of type {kind!r} cannot be imported", cause="; ".join(unsupported))
    read = Config(config)
    heads, width = read.number("num_attention_heads"), read.number("hidden_size")
    head_dim = config.get("head_dim") or 0
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_layers": read.number("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "context": read.number("max_position_embeddings"),
        "vocab_size": read.number("vocab_size"),
        "rope_theta": rope_theta(config),
        "norm_eps": float(config["rms_norm_eps"]),
        "init_std": float(config.get("initializer_range") or 0.02),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "head_dim": 0 if head_dim * heads == width else head_dim,
        "rope": rope_of(config),
    }
    shape.update(layout.more(read))
    moe = layout.moe(read)
    # What a public model computes is computed, even if it teaches its router nothing; the plan says so.
    alone = moe.preset != DENSE and moe.top_k == 1 and resolve_moe(moe).renormalise
    return ModelSpec(backbone=backbone.name, moe=replace(moe, fixed_weight=alone), **shape)
