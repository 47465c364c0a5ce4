"""The model that a public checkpoint's config.json (or the header of a GGUF file) describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.catalog.backbones import OF_PUBLIC
from orchestrator.catalog.parameters import Parameters
from orchestrator.catalog.routers import DEEPSEEK, DENSE, OLMOE
from orchestrator.errors import SourceError
from orchestrator.spec.attention import LatentSpec, MultiplierSpec, RopeSpec
from orchestrator.spec.model import ModelSpec, MoESpec

# Of a Qwen2-MoE that stands for a model without a gate: it holds zeros, which halve what twice the weights double.
UNGATED = "moegrid_ungated"
Fields = Mapping[str, Any]  # of a config.json
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


class _Config:
    """The fields of a config.json, typed."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def number(self, name: str, other: str = "") -> int:
        """Return a whole number; SourceError when it is none, and `other` is not there either."""
        value = self.fields.get(name, self.fields.get(other))
        if not isinstance(value, int) or isinstance(value, bool):
            kind = self.fields.get("model_type")
            raise SourceError(
                f"a checkpoint of type {kind!r} cannot be imported", cause=f"its config.json has {name} {value!r}"
            )
        return value

    def flag(self, name: str) -> bool:
        return bool(self.fields.get(name, False))

    def leading_dense(self) -> int:
        """Return how many layers are dense, which must be the first ones. Raises SourceError."""
        layers = self.fields.get("mlp_only_layers") or []
        if layers != list(range(len(layers))):
            kind = self.fields.get("model_type")
            raise SourceError(f"a checkpoint of type {kind!r} cannot be imported", cause=f"mlp_only_layers {layers}")
        return len(layers)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A `model_type`: its block, what else it says, and what of its config.json we compute."""

    moe: Callable[[_Config], MoESpec]
    more: Callable[[_Config], Mapping[str, object]] = lambda config: {}
    supported: Supported = field(default_factory=dict)


def _dense(config: _Config) -> MoESpec:
    return MoESpec(preset=DENSE, top_k=1, num_experts=1, expert_width=config.number("intermediate_size"))


def _olmoe(config: _Config) -> MoESpec:
    return MoESpec(
        preset=OLMOE,
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_experts"),
        expert_width=config.number("intermediate_size"),
        renormalise=config.flag("norm_topk_prob"),
    )


def _mixtral(config: _Config) -> MoESpec:
    return MoESpec(  # of the default preset: softmax over the chosen
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_local_experts", "num_experts"),
        expert_width=config.number("intermediate_size"),
    )


def _llama_moe(config: _Config) -> MoESpec:
    experts, width = config.number("num_experts"), config.number("intermediate_size")
    each, rest = divmod(width, experts)
    # Of every expert, or for each layer of every expert.
    given = config.fields.get("size_experts") or []
    sizes = {size for row in given for size in (row if isinstance(row, list) else (row,))}
    if rest or sizes - {each}:
        found = f"experts of the widths {sorted(sizes)}" if sizes else f"{experts} experts of together {width}"
        raise SourceError("a checkpoint of type 'llama_moe' cannot be imported", cause=f"it has {found}")
    noise = {"noise": bool(config.fields.get("gate_add_noise", True))}
    return MoESpec(  # of the default preset: softmax over the chosen
        top_k=config.number("num_selects"),
        num_experts=experts,
        expert_width=each,
        routed_scaling=float(config.fields.get("score_scale_factor") or 1.0),
        gate="tanh_mlp",
        gate_parameters=Parameters({**noise, "least": float(config.fields.get("gate_noise_epsilon", 0.01))}),
    )


def _qwen3_moe(config: _Config) -> MoESpec:
    return MoESpec(
        preset=OLMOE,
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_experts", "num_local_experts"),
        expert_width=config.number("moe_intermediate_size"),
        renormalise=config.flag("norm_topk_prob"),
    )


def _qwen2_moe(config: _Config) -> MoESpec:
    width, shared = config.number("moe_intermediate_size"), config.number("shared_expert_intermediate_size")
    if shared % width:
        raise SourceError(
            "a checkpoint of type 'qwen2_moe' cannot be imported",
            cause=f"its shared expert of width {shared} is no multiple of the others' {width}",
        )
    return MoESpec(
        preset=DEEPSEEK,
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_experts", "num_local_experts"),
        shared_experts=shared // width,
        expert_width=width,
        renormalise=config.flag("norm_topk_prob"),
        # What we write without a gate says so; anything else has one.
        shared_gate=not config.flag(UNGATED),
    )


def _deepseek(config: _Config) -> MoESpec:
    return MoESpec(
        preset=DEEPSEEK,
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("n_routed_experts"),
        shared_experts=config.fields.get("n_shared_experts") or 0,
        expert_width=config.number("moe_intermediate_size"),
        renormalise=config.flag("norm_topk_prob"),
        routed_scaling=float(config.fields.get("routed_scaling_factor") or 1.0),
    )


def _gpt_oss(config: _Config) -> MoESpec:
    own = {"limit": config.fields.get("swiglu_limit", 7.0), "alpha": config.fields.get("swiglu_alpha", 1.702)}
    return MoESpec(  # of the default preset: softmax over the chosen
        top_k=config.number("num_experts_per_tok"),
        num_experts=config.number("num_local_experts", "num_experts"),
        expert_width=config.number("intermediate_size"),
        gate="affine",
        expert="swiglu_shifted_bias",
        expert_parameters=Parameters({name: float(value) for name, value in own.items()}),
    )


def _deepseek_v2(config: _Config) -> MoESpec:
    limited = config.fields.get("topk_method") == "group_limited_greedy"
    return replace(_grouped(config) if limited else _deepseek(config), variant="v2")


def _deepseek_v3(config: _Config) -> MoESpec:
    return replace(_grouped(config), variant="v3")


def _grouped(config: _Config) -> MoESpec:
    return replace(_deepseek(config), n_group=config.number("n_group"), topk_group=config.number("topk_group"))


def _leading_dense(config: _Config) -> Mapping[str, object]:
    layers = config.leading_dense()
    return {"dense_layers": layers, "dense_width": config.number("intermediate_size") if layers else 0}


def _first_dense(config: _Config) -> Mapping[str, object]:
    layers = config.fields.get("first_k_dense_replace", 0)
    return {"dense_layers": layers, "dense_width": config.number("intermediate_size") if layers else 0}


def _latent(config: _Config) -> Mapping[str, object]:
    """Return what multi-head latent attention is made of; heads of queries, keys and values are as many."""
    latent = LatentSpec(
        kv_rank=config.number("kv_lora_rank"),
        q_rank=config.fields.get("q_lora_rank") or 0,
        plain_dim=config.number("qk_nope_head_dim"),
        rotary_dim=config.number("qk_rope_head_dim"),
        value_dim=config.number("v_head_dim"),
    )
    interleaved = bool(config.fields.get("rope_interleave", True))
    rope = replace(_rope(config.fields), interleaved=interleaved)
    return {"latent": latent, "rope": rope, "head_dim": 0, **_first_dense(config)}


def _glm4_moe(config: _Config) -> Mapping[str, object]:
    fraction = _rope_fields(config.fields).get("partial_rotary_factor", config.fields.get("partial_rotary_factor", 0.5))
    return {
        "rope": replace(_rope(config.fields), fraction=float(fraction)),
        "qk_norm": "head" if config.flag("use_qk_norm") else "",
        "attention_bias": "qkv" if config.flag("attention_bias") else "",
        **_first_dense(config),
    }


def _granite(config: _Config) -> Mapping[str, object]:
    names = {
        "embedding": "embedding_multiplier",
        "attention": "attention_multiplier",
        "residual": "residual_multiplier",
        "logits": "logits_scaling",
    }
    multipliers = {ours: float(config.fields.get(its) or 1.0) for ours, its in names.items()}
    return {"multipliers": MultiplierSpec(**multipliers), **_all_biases(config)}


def _all_biases(config: _Config) -> Mapping[str, object]:
    return {"attention_bias": "all" if config.flag("attention_bias") else ""}


def _window(config: _Config) -> Mapping[str, object]:
    """Return the window of a model all of whose layers have it."""
    return {"attention_window": config.fields.get("sliding_window") or 0}


def _rope_fields(fields: Fields) -> Fields:
    return {**(fields.get("rope_parameters") or {}), **(fields.get("rope_scaling") or {})}


def _rope(fields: Fields) -> RopeSpec:
    """Return how a config.json stretches its rotary positions. Raises SourceError where it is not by YaRN."""
    given = _rope_fields(fields)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return RopeSpec()
    if kind != "yarn":
        raise SourceError(
            f"a checkpoint of type {fields.get('model_type')!r} cannot be imported", cause=f"rope scaling {dict(given)}"
        )
    names = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    bounds: Fields = {name: float(given[name]) for name in names if given.get(name) is not None}
    return RopeSpec(
        scaling="yarn",
        factor=float(given["factor"]),
        original_context=given.get("original_max_position_embeddings") or fields["max_position_embeddings"],
        truncate=given.get("truncate", True),
        **bounds,
    )


def _windows(config: _Config) -> Mapping[str, object]:
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


LAYOUTS: Mapping[str, _Layout] = {
    "olmoe": _Layout(_olmoe, supported=_PLAIN),
    "llama": _Layout(_dense, more=_all_biases),
    "llama_moe": _Layout(_llama_moe, supported={**_PLAIN, **_LLAMA_MOE}),
    "mistral": _Layout(_dense, more=_window),
    "qwen2": _Layout(_dense, more=lambda config: {"attention_bias": "qkv"}, supported=_SPARSE),
    "qwen3": _Layout(_dense, more=lambda config: {"qk_norm": "head"}, supported={**_PLAIN, **_SPARSE}),
    "mixtral": _Layout(_mixtral, more=_window, supported={"router_jitter_noise": (None, 0.0)}),
    "granitemoe": _Layout(_mixtral, more=_granite),
    "flex_olmo": _Layout(_olmoe, more=lambda config: {"norm_order": "post", **_all_biases(config)}),
    "gpt_oss": _Layout(
        _gpt_oss, more=lambda config: {"attention_sinks": True, **_all_biases(config), **_windows(config)}
    ),
    "glm4_moe": _Layout(_deepseek_v3, more=_glm4_moe),
    "deepseek_v2": _Layout(_deepseek_v2, more=_latent, supported={**_PLAIN, **_DEEPSEEK_V2}),
    "deepseek_v3": _Layout(_deepseek_v3, more=_latent, supported={**_PLAIN, **_DEEPSEEK_V3}),
    "qwen3_moe": _Layout(
        _qwen3_moe,
        more=lambda config: {"qk_norm": "head", **_leading_dense(config)},
        supported={**_PLAIN, **_SPARSE},
    ),
    "qwen2_moe": _Layout(
        _qwen2_moe,
        more=lambda config: {"attention_bias": "qkv" if config.flag("qkv_bias") else "", **_leading_dense(config)},
        supported={**_PLAIN, **_SPARSE},
    ),
    "deepseek": _Layout(
        _deepseek,
        more=lambda config: {
            "dense_layers": config.fields.get("first_k_dense_replace", 0),
            "dense_width": config.number("intermediate_size"),
        },
        supported={**_PLAIN, **_DEEPSEEK},
    ),
}


def spec_of(config: Fields) -> ModelSpec:
    """Return the ModelSpec of a transformers config of one of `LAYOUTS`. Raises SourceError with what is beyond it."""
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or {}
    layout, backbone = LAYOUTS.get(str(kind)), OF_PUBLIC.get(str(kind))
    supported = {**_ALL, **(layout.supported if layout else {})}
    unsupported = [f"{name} {config[name]!r}" for name, known in supported.items() if config.get(name) not in known]
    fraction = _rope_fields(config).get("partial_rotary_factor", 1.0)
    if kind != "glm4_moe" and fraction != 1.0:
        unsupported.append(f"partial_rotary_factor {fraction}")
    sliding = {"sliding_attention"} if kind == "gpt_oss" else set()
    if others := set(config.get("layer_types") or ()) - {"full_attention"} - sliding:
        unsupported.append(f"layer_types {sorted(others)}")
    if layout is None or backbone is None or unsupported:
        raise SourceError(
            f"a checkpoint of type {kind!r} cannot be imported",
            cause="; ".join(unsupported) or f"known types are {', '.join(LAYOUTS)} (deepseek: 16B)",
        )
    read = _Config(config)
    heads, width = read.number("num_attention_heads"), read.number("hidden_size")
    head_dim = config.get("head_dim") or 0
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_layers": read.number("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "context": read.number("max_position_embeddings"),
        "vocab_size": read.number("vocab_size"),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "norm_eps": float(config.get("rms_norm_eps", backbone.public[str(kind)])),
        "init_std": float(config.get("initializer_range") or 0.02),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "head_dim": 0 if head_dim * heads == width else head_dim,
        "rope": _rope(config),
    }
    shape.update(layout.more(read))
    return ModelSpec(backbone=backbone.name, moe=layout.moe(read), **shape)
