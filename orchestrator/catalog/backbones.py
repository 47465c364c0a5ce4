"""Backbones: the architectures around the MoE blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class BackboneKind:
    """One architecture.

    `query_key_norm`: queries and keys are normed, as whole projections, before the rotary embedding. `public` are the
    `model_type`s of transformers whose checkpoints it computes.
    """

    name: str
    query_key_norm: bool = False
    public: tuple[str, ...] = ()


_OURS = (
    BackboneKind("olmoe", query_key_norm=True, public=("olmoe", "flex_olmo")),
    BackboneKind(
        "deepseek_moe",
        public=("deepseek", "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"),
    ),
    BackboneKind(
        "llama",
        public=(
            "llama",
            "llama_moe",
            "mistral",
            "qwen2",
            "qwen3",
            "phi3",
            "mixtral",
            "qwen3_moe",
            "granitemoe",
            "gpt_oss",
        ),
    ),
)
# What a backbone was called when the first results were made: their keys hold that name, and stay. It is told of.
FORMERLY: Mapping[str, str] = MappingProxyType({"llama": "smollm2"})
DEFAULT_BACKBONE = _OURS[0].name
BACKBONES: Mapping[str, BackboneKind] = MappingProxyType({kind.name: kind for kind in _OURS})
# transformers' model_type -> what computes its checkpoints.
OF_PUBLIC: Mapping[str, BackboneKind] = MappingProxyType({word: kind for kind in _OURS for word in kind.public})
