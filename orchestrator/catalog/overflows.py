"""Overflows: what becomes of assignments that are more than an expert takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class OverflowKind:
    """An overflow by name.

    `code` is a function "package.module:name" of `jobs.moe.overflow.Asked` -> which assignments are kept, bool [T,K].
    What is not kept leaves its slot empty. `causal`: no later token changes what is kept of an earlier one.
    `parameters` is a frozen dataclass of scalars, the code's last argument (`MoESpec.overflow_parameters`), None for
    none.
    """

    name: str
    code: str = ""
    description: str = ""
    version: int = 1
    parameters: type | None = None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many assignments an expert takes of a group of tokens, and which."""

    factor: float = 1.0
    """Times the group's tokens / experts, rounded up: int(factor * ceil(T / N)) (GShard's two experts: 2)."""
    tokens: int = 0
    """That many, whatever the group has (Switch Transformers, NLLB-MoE); 0 = by the factor."""
    eval_fraction: float = 0.0
    """In evaluation ceil(fraction * T); 0 = as in training."""
    group: str = "sequence"
    """Tokens that are counted together: `sequence` or `batch`."""
    order: str = "position"
    """Who comes first: `position`, or the best `score` (batch-prioritised routing). First choices before second."""

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor must be above 0, not {self.factor:g}")
        if self.tokens < 0:
            raise ValueError(f"tokens must not be negative, it is {self.tokens}")
        if not 0 <= self.eval_fraction <= 1:
            raise ValueError(f"eval_fraction must lie between 0 and 1, it is {self.eval_fraction:g}")
        for name, choices in (
            ("group", ("sequence", "batch")),
            ("order", ("position", "score")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {getattr(self, name)!r}")


NONE = "none"
_OURS = (
    OverflowKind(NONE, description="an expert takes all", causal=True),
    OverflowKind(
        "capacity",
        "jobs.moe.overflow:capacity",
        "what is above an expert's capacity is dropped (GShard, Switch Transformer)",
        parameters=Capacity,
    ),
)
BUILTINS: Mapping[str, OverflowKind] = MappingProxyType({kind.name: kind for kind in _OURS})
OVERFLOWS = Registry("overflows", "overflow", OverflowKind, BUILTINS)
