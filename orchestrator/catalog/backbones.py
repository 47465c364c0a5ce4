"""Backbones: the architectures around the MoE blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class BackboneKind:
    """One architecture.

    `query_key_norm`: queries and keys are normed, as whole projections, before the rotary embedding. `public` are the
    `model_type`s of transformers whose checkpoints it computes, with the epsilon of their norms where a config.json
    leaves that to its class.
    """

    name: str
    query_key_norm: bool = False
    public: Mapping[str, float] = field(default_factory=dict)


_OURS = (
    BackboneKind("olmoe", query_key_norm=True, public={"olmoe": 1e-5, "flex_olmo": 1e-6}),
    BackboneKind(
        "deepseek_moe",
        public={"deepseek": 1e-6, "qwen2_moe": 1e-6, "deepseek_v2": 1e-6, "deepseek_v3": 1e-6, "glm4_moe": 1e-5},
    ),
    BackboneKind(
        "llama",
        public={
            "llama": 1e-6,
            "llama_moe": 1e-6,
            "mistral": 1e-6,
            "qwen2": 1e-6,
            "qwen3": 1e-6,
            "mixtral": 1e-5,
            "qwen3_moe": 1e-6,
            "granitemoe": 1e-6,
            "gpt_oss": 1e-5,
        },
    ),
)
# What a backbone was called when the first results were made: their keys hold that name, and stay. It is told of.
FORMERLY: Mapping[str, str] = MappingProxyType({"llama": "smollm2"})
DEFAULT_BACKBONE = _OURS[0].name
BACKBONES: Mapping[str, BackboneKind] = MappingProxyType({kind.name: kind for kind in _OURS})
# transformers' model_type -> what computes its checkpoints.
OF_PUBLIC: Mapping[str, BackboneKind] = MappingProxyType({word: kind for kind in _OURS for word in kind.public})
