"""Early stopping: what of a metric was seen so far, a part of the state, so that a resumed run stops at the same step.

A phase that has stopped takes no more steps, and keeps its plan: the states that lie behind are made of equal weights,
so that fractions of the run, and what cells have in common, stay those of the whole length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.spec.training import StopSpec


@dataclass(slots=True)
class Stopping:
    """The window that is open, the last improvement, windows since then, and after which step training ended."""

    total: float = 0.0
    steps: int = 0
    best: float = math.inf
    waited: int = 0
    at: int = 0
    loss: float = 0.0  # language-model loss of the last step

    def see(self, spec: StopSpec, values: Mapping[str, float], step: int) -> None:
        """Take in the values of the phase's `step`-th step, counted from 1; `at` is set where it was the last.

        A window ends with each step whose number `every` divides: wherever a run is cut.
        """
        self.loss = values["train/lm_loss"]
        if not spec.metric:
            return
        self.total += values[f"train/{spec.metric}"]
        self.steps += 1
        if step % spec.every:
            return
        mean, self.total, self.steps = self.total / self.steps, 0.0, 0
        if mean < self.best - spec.improvement:
            self.best, self.waited = mean, 0
        else:
            self.waited += 1
        if (spec.below and mean < spec.below) or (spec.patience and self.waited >= spec.patience):
            self.at = step

    def to_json(self) -> dict[str, object]:
        """Return what a state keeps of it; no best yet is null."""
        return {**asdict(self), "best": self.best if math.isfinite(self.best) else None}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any] | None) -> Stopping:
        """Return what a state kept; a phase begins with nothing."""
        if kept is None:
            return cls()
        return cls(**{**kept, "best": math.inf if kept["best"] is None else kept["best"]})
