"""What of a decoder differs between public models beside its shape: rotary positions, latents, multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated

from orchestrator.spec.identity import NEUTRAL
from orchestrator.spec.rules import ABOVE_ZERO, NATURAL, NOT_NEGATIVE, Rule, one_of

# How frequencies are stretched for a longer context -> the fields of `RopeSpec` that say it in full, the first of which
# it needs. YaRN: Peng et al. 2024; `linear`: all are divided (Chen et al. 2023); `llama3`: slow ones are (Llama 3.1);
# `dynamic`: the base grows with sequences beyond the context (NTK-aware scaling); `longrope`: each is divided by its
# own number, by another one in sequences beyond the original context (Ding et al. 2024).
SCALINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "": (),
        "yarn": (
            "original_context",
            "factor",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        ),
        "linear": ("factor",),
        "llama3": ("original_context", "factor", "low_freq_factor", "high_freq_factor"),
        "dynamic": ("original_context", "factor"),
        "longrope": ("original_context", "factor", "short_factor", "long_factor", "attention_factor"),
    }
)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions beyond their base: how much of a head turns, and how they reach beyond the first context."""

    fraction: Annotated[float, Rule(above=0, high=1)] = 1.0
    """Share of a head's width that is turned (GLM4-MoE: 0.5)."""
    interleaved: bool = False
    """Whether pairs that turn together lie side by side (DeepSeek V2, V3), not half a head apart."""
    scaling: Annotated[str, one_of(*SCALINGS)] = ""
    """How frequencies are stretched for a longer context (`SCALINGS`), "" = not."""
    factor: Annotated[float, ABOVE_ZERO] = 1.0
    """By how much the context is longer than `original_context`; what stretched frequencies are divided by."""
    original_context: Annotated[int, NATURAL] = 0
    """Context before it was stretched."""
    beta_fast: Annotated[float, ABOVE_ZERO] = 32.0
    """Rotations in the original context above which a frequency stays as it is."""
    beta_slow: Annotated[float, ABOVE_ZERO] = 1.0
    """Rotations below which it is divided by `factor`."""
    truncate: bool = True
    """Whether the bounds between them are rounded to whole dimensions."""
    attention_factor: Annotated[float, NOT_NEGATIVE] = 0.0
    """Factor of cosines and sines, 0 = what `factor` and the two scales say."""
    mscale: Annotated[float, NOT_NEGATIVE] = 0.0
    """DeepSeek's scale of that factor, 0 = none."""
    mscale_all_dim: Annotated[float, NOT_NEGATIVE] = 0.0
    """The scale that divides it, and that of the attention's logits, 0 = none."""
    low_freq_factor: Annotated[float, ABOVE_ZERO] = field(default=1.0, metadata=NEUTRAL)
    """Llama 3: rotations in the original context below which a frequency is divided by `factor`."""
    high_freq_factor: Annotated[float, ABOVE_ZERO] = field(default=4.0, metadata=NEUTRAL)
    """Llama 3: rotations above which it stays as it is."""
    short_factor: Annotated[tuple[float, ...], ABOVE_ZERO] = field(default=(), metadata=NEUTRAL)
    """LongRoPE: what each frequency is divided by in sequences within `original_context`."""
    long_factor: Annotated[tuple[float, ...], ABOVE_ZERO] = field(default=(), metadata=NEUTRAL)
    """LongRoPE: the same in longer sequences, of all their positions."""

    def by_length(self, context: int) -> bool:
        """Return whether a sequence within `context` may turn its first tokens otherwise once it is longer."""
        return self.scaling == "dynamic" or (self.scaling == "longrope" and context > self.original_context)

    @property
    def table_factor(self) -> float:
        """Factor of cosines and sines (YaRN, section 3.4; DeepSeek divides by the second scale; LongRoPE)."""
        if self.scaling not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor:
            return self.attention_factor
        if self.scaling == "longrope":
            beyond = max(math.log(self.factor), 0.0)
            return math.sqrt(1.0 + beyond / math.log(self.original_context))
        if self.mscale and self.mscale_all_dim:
            return _magnitude(self.factor, self.mscale) / _magnitude(self.factor, self.mscale_all_dim)
        return _magnitude(self.factor, 1.0)

    @property
    def logit_factor(self) -> float:
        """Factor of the logits of latent attention (DeepSeek): the second scale, squared."""
        return _magnitude(self.factor, self.mscale_all_dim) ** 2 if self.scaling and self.mscale_all_dim else 1.0


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are made of one latent a token."""

    kv_rank: Annotated[int, NATURAL] = 0
    """Width of the latent of keys and values, 0 = attention without latents."""
    q_rank: Annotated[int, NATURAL] = 0
    """Width of the latent of queries, 0 = a matrix."""
    plain_dim: Annotated[int, NATURAL] = 0
    """Width of the part of a head without position."""
    rotary_dim: Annotated[int, NATURAL] = 0
    """Width of the part with position; of keys all heads share it."""
    value_dim: Annotated[int, NATURAL] = 0
    """Width of a head's values."""


@dataclass(frozen=True, slots=True)
class MultiplierSpec:
    """Constants that scale what flows through a model (Granite)."""

    embedding: Annotated[float, ABOVE_ZERO] = 1.0
    """Of the embedded tokens."""
    attention: Annotated[float, NOT_NEGATIVE] = 0.0
    """Of the attention's logits, 0 = 1 / sqrt(head width)."""
    residual: Annotated[float, ABOVE_ZERO] = 1.0
    """Of what a layer adds to the residual stream."""
    logits: Annotated[float, ABOVE_ZERO] = 1.0
    """The logits are divided by it."""
