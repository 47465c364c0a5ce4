"""Scores: from a token's logits to what experts are selected by and weighed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class ScoreKind:
    """A score by name.

    `code` is a function "package.module:name" of (logits [T,N] in fp32) -> scores [T,N], differentiable, not negative,
    and never smaller for a larger logit; a logit of -inf (a removed expert) scores 0. `distribution`: a token's scores
    sum to 1, as losses and metrics need probabilities. `projected`: the logits are those of a router of its own, so
    that only presets that name the score have it. `parameters` is a frozen dataclass of scalars, the code's last
    argument (`MoESpec.score_parameters`), None for none.
    """

    name: str
    code: str
    distribution: bool = False
    projected: bool = False
    description: str = ""
    version: int = 1
    parameters: type | None = None


_OURS = (
    ScoreKind("softmax", "jobs.moe.scores:softmax", distribution=True, description="softmax over the ids"),
    ScoreKind("sigmoid", "jobs.moe.scores:sigmoid", description="sigmoid of each logit"),
    ScoreKind("sqrt_softplus", "jobs.moe.scores:sqrt_softplus", description="sqrt(softplus(logit)) (DeepSeek V4)"),
    ScoreKind(
        "cosine",
        "jobs.moe.scores:softmax",
        distribution=True,
        projected=True,
        description="softmax over cosines on a projection (X-MoE)",
    ),
)
BUILTINS: Mapping[str, ScoreKind] = MappingProxyType({kind.name: kind for kind in _OURS})
SCORES = Registry("scores", "score", ScoreKind, BUILTINS)
