"""The model that a public checkpoint's config.json (or the header of a GGUF file) describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.catalog.backbones import OF_PUBLIC
from orchestrator.catalog.routers import DEEPSEEK, DENSE, OLMOE
from orchestrator.errors import SourceError
from orchestrator.spec.model import ModelSpec, MoESpec

# Of a Qwen2-MoE that stands for a model without a gate: it holds zeros, which halve what twice the weights double.
UNGATED = "moegrid_ungated"
# Values of a field of config.json that our models compute.
Supported = Mapping[str, tuple[object, ...]]
_ALL: Supported = {"clip_qkv": (None,), "mlp_bias": (None, False), "hidden_act": (None, "silu")}
_PLAIN: Supported = {"attention_bias": (None, False)}
_NO_WINDOW: Supported = {"sliding_window": (None,)}
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


class _Config:
    """The fields of a config.json, typed."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
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


def _leading_dense(config: _Config) -> Mapping[str, object]:
    layers = config.leading_dense()
    return {"dense_layers": layers, "dense_width": config.number("intermediate_size") if layers else 0}


LAYOUTS: Mapping[str, _Layout] = {
    "olmoe": _Layout(_olmoe, supported=_PLAIN),
    "llama": _Layout(
        _dense,
        more=lambda config: {"attention_bias": "all" if config.flag("attention_bias") else ""},
    ),
    "mistral": _Layout(_dense, supported=_NO_WINDOW),
    "qwen2": _Layout(_dense, more=lambda config: {"attention_bias": "qkv"}, supported=_SPARSE),
    "qwen3": _Layout(_dense, more=lambda config: {"qk_norm": "head"}, supported={**_PLAIN, **_SPARSE}),
    "mixtral": _Layout(_mixtral, supported={**_NO_WINDOW, "router_jitter_noise": (None, 0.0)}),
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


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """Return the ModelSpec of a transformers config of one of `LAYOUTS`. Raises SourceError with what is beyond it."""
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or {}
    layout, backbone = LAYOUTS.get(str(kind)), OF_PUBLIC.get(str(kind))
    supported = {**_ALL, **(layout.supported if layout else {})}
    unsupported = [f"{name} {config[name]!r}" for name, known in supported.items() if config.get(name) not in known]
    for scaling in (config.get("rope_scaling") or {}, rope):
        if (scaling.get("rope_type") or scaling.get("type") or "default") != "default":
            unsupported.append(f"rope scaling {scaling}")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        unsupported.append(f"layer_types {sorted(set(config['layer_types']))}")
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
    }
    shape.update(layout.more(read))
    return ModelSpec(backbone=backbone.name, moe=layout.moe(read), **shape)
