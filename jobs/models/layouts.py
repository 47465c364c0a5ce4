"""Which architecture of transformers computes what a model does, and names of tensors that are a layout's own.

| ours | architecture |
|---|---|
| backbone olmoe, softmax top-k | OlmoeForCausalLM; FlexOlmoForCausalLM with `norm_order: post` |
| preset dense with swiglu, another backbone | LlamaForCausalLM |
| softmax top-k with shared experts, another backbone (DeepSeekMoE 16B) | Qwen2MoeForCausalLM |
| renormalised softmax top-k without shared experts, another backbone (an upcycled dense model) | MixtralForCausalLM |
| the same with multipliers; with sinks, biased logits and shifted swiglu | GraniteMoeForCausalLM; GptOssForCausalLM |
| softmax top-k without shared experts, queries and keys normed in each head (`qk_norm: head`) | Qwen3MoeForCausalLM |
| sigmoid scores with a balancing bias and shared experts (variant v3) | Glm4MoeForCausalLM |
| latent attention with it, or with softmax scores (variant v2) | DeepseekV3ForCausalLM, DeepseekV2ForCausalLM |
| preset dense, `qk_norm: head`, or biases of queries, keys and values | Qwen3ForCausalLM, Qwen2ForCausalLM |
| preset dense with LongRoPE, or of whose heads a part turns | Phi3ForCausalLM |

transformers has no class for DeepSeekMoE 16B: `deepseek_v2` and `deepseek_v3` have another attention. Qwen2-MoE without
biases is the same model but for a gate, sigmoid(w x), on its shared expert: w = 0 halves it, which twice the weights of
its last matrix undo, exactly. A factor on the routed experts goes into their last matrices where the layout has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.moe.block import dense_width
from orchestrator.catalog.routers import kind_of
from orchestrator.errors import MoegridError
from orchestrator.spec.attention import RopeSpec
from orchestrator.spec.model import DEFAULTS, PARTS, Model, ModelSpec, Moe, MoESpec

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "olmoe": "Olmoe",
    "flex_olmo": "FlexOlmo",
    "mixtral": "Mixtral",
    "granitemoe": "GraniteMoe",
    "gpt_oss": "GptOss",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "glm4_moe": "Glm4Moe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
}
# Layouts that share what their config.json says of the block.
DENSE = ("llama", "mistral", "qwen2", "qwen3", "phi3")
DEEPSEEK = ("glm4_moe", "deepseek_v2", "deepseek_v3")
OLMOES = ("olmoe", "flex_olmo")
MIXTRALS = ("mixtral", "granitemoe", "gpt_oss")
# Those that have heads of any width.
HEADS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", *MIXTRALS, "flex_olmo", *DEEPSEEK)
# What our block may do that no layout holds, unless it is said below; other fields change nothing without one of these.
_OURS = (
    "score",
    "choice",
    "unit",
    "n_group",
    "balance_bias",
    "collaboration_top",
    "zero_experts",
    "copy_experts",
    "constant_experts",
    "null_experts",
    "gating_residual",
    "gating_layers",
    "temperature",
    "combine",
    "expert",
)
# Of the neutral ones: a gate that one layout has, and others refuse below; a weight that all have.
_PARTS = tuple(name for name in PARTS if name not in ("shared_gate", "fixed_weight"))
_BLOCKS: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "gpt_oss": {"gate": ("affine",), "expert": ("swiglu_shifted_bias",)},
    "qwen2_moe": {"shared_width": ()},
    "deepseek_v2": {"n_group": ()},
    "deepseek_v3": {"score": ("sigmoid",), "balance_bias": (True,), "n_group": ()},
    "glm4_moe": {"score": ("sigmoid",), "balance_bias": (True,), "n_group": ()},
}
# What is around the block that only some layouts have, and what each has without it being said of it.
_AROUND: Mapping[str, tuple[str, ...]] = {
    "attention_window": ("mistral", "mixtral", "gpt_oss", "phi3"),
    "attention_sinks": ("gpt_oss",),
    "norm_order": ("flex_olmo",),
    "latent": ("deepseek_v2", "deepseek_v3"),
    "multipliers": ("granitemoe",),
}
# Layouts that have projections with biases (without any, unless one is said here).
_BIASES = {
    "llama": ("", "all"),
    "olmoe": ("", "all"),
    "qwen2": ("qkv",),
    "qwen3": ("", "all"),
    "qwen2_moe": ("", "qkv"),
    "qwen3_moe": ("", "all"),
    "gpt_oss": ("", "all"),
    "granitemoe": ("", "all"),
    "flex_olmo": ("", "all"),
    "glm4_moe": ("", "qkv"),
}
EXPORTED = (
    "softmax top-k of swiglu experts is exported: on backbone olmoe without shared experts, on the others with shared"
    " experts (sum), or renormalised without; dense models (swiglu) but on backbone olmoe; more in docs/models.md"
)


def public_layout(spec: Model) -> str:
    """Return the `model_type` of the architecture of transformers that computes what `spec` does.

    Raises MoegridError that names what none of them has.
    """
    layout, own = _layout(spec)
    own += _of_block(spec.moe, layout) + _around(spec, layout)
    if own:
        raise MoegridError(
            f"preset {spec.moe.preset!r} on backbone {spec.backbone!r} has no public layout",
            cause=f"no architecture of transformers has {', '.join(own)}",
            hint=EXPORTED,
        )
    return layout


def _as_phi3(rope: RopeSpec) -> bool:
    """Return whether positions turn as in a Phi-3, and as in none of the other dense layouts or rarely there."""
    return rope.scaling == "longrope" or (not rope.scaling and rope.fraction != 1.0)


def _layout(spec: Model) -> tuple[str, list[str]]:
    """Return the layout nearest to a model, and what it does not have of the model's feed-forwards."""
    moe, own = spec.moe, list[str]()
    dense = [f"dense_layers {spec.dense_layers}"] if spec.dense_layers else []
    shared = [f"shared_experts {moe.shared_experts}"] if moe.shared_experts else []
    if not kind_of(moe).routes:
        if spec.normed == "full":
            own.append("dense layers with the attention of OLMoE")
        if len({dense_width(moe), *([spec.dense_width] if spec.dense_layers else [])}) > 1:
            own.append(f"dense layers of two widths ({spec.dense_width} and {dense_width(moe)})")
        if not (spec.normed or spec.attention_bias or spec.head_dim) and _as_phi3(spec.rope):
            return "phi3", own
        biased = "qwen2" if spec.attention_bias == "qkv" else "llama"
        return "qwen3" if spec.normed else "mistral" if spec.attention_window else biased, own
    if spec.latent.kv_rank or moe.balance_bias:
        latent = "deepseek_v3" if moe.score == "sigmoid" else "deepseek_v2"
        own += [] if moe.shared_experts else ["no shared experts"]
        if not spec.latent.kv_rank:
            own += ["norms over all heads"] if spec.normed == "full" else []
        return latent if spec.latent.kv_rank else "glm4_moe", own
    if spec.normed == "full":
        post = spec.norm_order == "post"
        own += dense + shared + ([f"routed_scaling {moe.routed_scaling}"] if moe.routed_scaling != 1 else [])
        return "flex_olmo" if post else "olmoe", own
    if moe.shared_experts:
        return "qwen2_moe", ["normed heads beside shared experts"] if spec.normed else []
    if spec.normed:
        return "qwen3_moe", own
    own += [] if moe.renormalise else ["renormalise False without shared experts"]
    own += [f"{dense[0]} without shared experts"] if dense else []
    if spec.attention_sinks:
        own += [f"routed_scaling {moe.routed_scaling}"] if moe.routed_scaling != 1 else []
        return "gpt_oss", own
    return "granitemoe" if spec.multipliers != ModelSpec().multipliers else "mixtral", own


def _of_block(moe: Moe, layout: str) -> list[str]:
    """Return what of the block the layout does not hold."""
    has, kind = _BLOCKS.get(layout, {}), kind_of(moe)
    usual = {**{name: DEFAULTS[name] for name in _OURS}, **{name: getattr(MoESpec(), name) for name in _PARTS}}
    allowed = {name: (value,) for name, value in usual.items() if name not in has} | {
        name: known for name, known in has.items() if known
    }
    own = [f"{name} {getattr(moe, name)!r}" for name, known in allowed.items() if getattr(moe, name) not in known]
    if moe.gate == "affine" and layout == "gpt_oss" and moe.gate_parameters:
        own.append(f"gate_parameters {dict(moe.gate_parameters)}")
    if layout in DEEPSEEK:
        score = "max" if layout == "deepseek_v2" else "top2_sum"
        own += [f"group_score {moe.group_score!r}"] if moe.n_group > 1 and moe.group_score != score else []
        own += ["renormalise True"] if layout == "deepseek_v2" and moe.renormalise else []
        own += ["a gate of the shared experts"] if moe.shared_gate else []
    if kind.routes and not kind.plain:
        own.append(f"the router of preset {moe.preset!r}")
    return own


def _around(spec: Model, layout: str) -> list[str]:
    """Return what of the attention and of the layers the layout does not hold."""
    usual = ModelSpec()
    own = [
        f"{name} {getattr(spec, name)!r}"
        for name, layouts in _AROUND.items()
        if layout not in layouts and getattr(spec, name) != getattr(usual, name)
    ]
    if spec.vision is not None:
        own.append(f"a vision side (vision.encoder {spec.vision.encoder})")
    if spec.full_every and layout != "gpt_oss":
        own.append(f"full_every {spec.full_every}")
    if layout == "deepseek_v2" and not spec.rope.interleaved:
        own.append("rope.interleaved False")
    if spec.rope.fraction != RopeSpec().fraction and layout not in ("glm4_moe", "phi3"):
        own.append(f"rope.fraction {spec.rope.fraction}")
    if spec.attention_bias not in _BIASES.get(layout, ("",)):
        own.append(f"attention_bias {spec.attention_bias!r}")
    if spec.head_width * spec.num_heads != spec.hidden_size and layout not in HEADS:
        own.append(f"head_dim {spec.head_dim}")
    return own


def side_by_side(tensor: Tensor) -> Tensor:
    """Return gate and up [..., 2f] as they lie one after the other in ours, turn by turn."""
    gate, up = tensor.chunk(2, dim=-1)
    return torch.stack([gate, up], dim=-1).flatten(-2)


def one_after_the_other(tensor: Tensor) -> Tensor:
    """Return gate and up that lie turn by turn [..., 2f], as ours: first all of the gate."""
    return torch.cat([tensor[..., ::2], tensor[..., 1::2]], dim=-1)


Turn = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Renamed:
    """A tensor of a layer by a layout's own name and by ours; how it is laid out when it comes in and goes out."""

    public: str
    ours: str
    comes: Turn | None = None
    goes: Turn | None = None


_LAYER = re.compile(r"(?:backbone\.)?(model\.layers\.\d+)\.(.+)")
_NAMES: Mapping[str, tuple[Renamed, ...]] = {
    "gpt_oss": (
        Renamed("self_attn.sinks", "self_attn.sinks.weight"),
        Renamed("mlp.router.weight", "mlp.block.router.gate.weight"),
        Renamed("mlp.router.bias", "mlp.block.router.gate.bias"),
        Renamed(
            "mlp.experts.gate_up_proj",
            "mlp.block.experts.up",
            lambda x: one_after_the_other(x).mT,
            lambda x: side_by_side(x.mT),
        ),
        Renamed("mlp.experts.gate_up_proj_bias", "mlp.block.experts.up_bias", one_after_the_other, side_by_side),
        Renamed("mlp.experts.down_proj", "mlp.block.experts.down", lambda x: x.mT, lambda x: x.mT),
        Renamed("mlp.experts.down_proj_bias", "mlp.block.experts.down_bias"),
    ),
    "llama_moe": (
        Renamed("mlp.gate.gate_network.0.weight", "mlp.block.router.gate.hidden"),
        Renamed("mlp.gate.gate_network.2.weight", "mlp.block.router.gate.weight"),
        Renamed("mlp.gate.weight_noise.weight", "mlp.block.router.gate.noise"),
    ),
    "granitemoe": (
        Renamed("block_sparse_moe.router.layer.weight", "mlp.block.router.weight"),
        Renamed("block_sparse_moe.router.weight", "mlp.block.router.weight"),
        Renamed("block_sparse_moe.input_linear.weight", "mlp.block.experts.up"),
        Renamed("block_sparse_moe.output_linear.weight", "mlp.block.experts.down"),
    ),
}


# A layout's tensors of a layer that hold some of ours, rows behind rows.
_FUSED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "phi3": {
        "self_attn.qkv_proj.weight": (
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
        ),
        "mlp.gate_up_proj.weight": ("mlp.block.ffn.gate", "mlp.block.ffn.up"),
    }
}


def fused(layout: str, name: str) -> tuple[str, ...]:
    """Return our names of what a checkpoint's tensor holds one after the other, none where it is one of ours."""
    match = _LAYER.fullmatch(name)
    parts = _FUSED.get(layout, {}).get(match[2], ()) if match else ()
    return tuple(f"backbone.{match[1]}.{part}" for part in parts) if match else ()


def fusing(layout: str, name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the layout's name of what one of our tensors is a part of, and our names of all parts, else None."""
    match = _LAYER.fullmatch(name)
    for public, parts in _FUSED.get(layout, {}).items() if match else ():
        if match is not None and match[2] in parts:
            return f"{match[1]}.{public}", tuple(f"backbone.{match[1]}.{part}" for part in parts)
    return None


def coming(layout: str, name: str) -> tuple[str, Turn | None] | None:
    """Return our name of a checkpoint's tensor whose layout has one of its own for it, and how it comes in."""
    match = _LAYER.fullmatch(name)
    for known in _NAMES.get(layout, ()) if match else ():
        if match is not None and match[2] == known.public:
            return f"backbone.{match[1]}.{known.ours}", known.comes
    return None


def going(layout: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield one of our tensors by the layout's own name, nothing where it has none for it."""
    match = _LAYER.fullmatch(name)
    for known in _NAMES.get(layout, ()) if match else ():
        if match is not None and match[2] == known.ours:
            yield f"{match[1]}.{known.public}", tensor if known.goes is None else known.goes(tensor)
            return
