"""The router NAME. In a grid: `plugins: [./NAME]`, under `set:` `model.moe: {preset: NAME, parameters: {scale: 2}}`.

This file is read by the plan, without torch; the code stands in `router.py`, which nodes alone import.
"""

from __future__ import annotations

from dataclasses import dataclass

from moegrid.extend import RouterKind


@dataclass(frozen=True)
class Parameters:
    """What a grid may set of it; a value that differs from its default is in the keys."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, not {self.scale:g}")


KIND = RouterKind(
    "NAME",
    code="NAME.router:Scaled",
    parameters=Parameters,
    # A row and a scale for each expert, of every layer: plan and model must agree to the last one.
    parameter_count=lambda moe, hidden_size: moe.num_experts * (hidden_size + 1),
)
