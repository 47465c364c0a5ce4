"""The loss scale of fp16: gradients too small for its five bits of exponent are trained on all the same.

The rule is that of torch's GradScaler (Micikevicius et al. 2018, section 3.2): the loss is multiplied by a power of
two, gradients are divided by it before they are applied; a step whose gradients are not finite is skipped and halves
the scale, GROWTH_STEPS applied ones in a row double it. Powers of two change no digit of what stays in range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST = 65536.0
# Below this a gradient overflows whatever its scale.
LEAST = 1.0
GROWTH_STEPS = 2000
PRECISION = "fp16"


@dataclass
class LossScale:
    """The scale of the next step, the steps applied in a row at it, and the steps of the phase that were skipped."""

    value: float = 1.0
    applied: int = 0
    skipped: int = 0

    @classmethod
    def of(cls, precision: str) -> LossScale:
        """Return the scale that a phase begins with."""
        return cls(FIRST) if precision == PRECISION else cls()

    def skip(self) -> bool:
        """Note a step whose gradients were not finite; returns whether a smaller scale can help."""
        if self.value <= LEAST:
            return False
        self.value /= 2
        self.applied = 0
        self.skipped += 1
        return True

    def apply(self, precision: str) -> None:
        """Note an applied step."""
        if precision != PRECISION:
            return
        self.applied += 1
        if self.applied == GROWTH_STEPS:
            self.value *= 2
            self.applied = 0

    def to_json(self) -> dict[str, Any]:
        """Return the scale as JSON types."""
        return {"value": self.value, "applied": self.applied, "skipped": self.skipped}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LossScale:
        """Return the scale that `to_json` described."""
        return cls(float(record["value"]), int(record["applied"]), int(record["skipped"]))
