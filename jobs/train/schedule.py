"""Learning rate as a pure function of the step and the planned total, so that a forked run equals an unforked one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

from orchestrator.catalog.parameters import made
from orchestrator.catalog.schedules import SCHEDULES
from orchestrator.registry import load
from orchestrator.spec.cell import TrainSpec


def warmup_steps(train: TrainSpec) -> int:
    """Return the number of warm-up steps, rounded up."""
    return math.ceil(train.warmup_ratio * train.steps - 1e-9)


def lr_factor(train: TrainSpec, step: int) -> float:
    """Return the factor on the peak learning rate that the optimizer step after `step` completed steps uses.

    Warm-up rises linearly and reaches 1 in its last step; after it the phase's schedule says the factor.
    """
    warm = warmup_steps(train)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, train.steps - warm)
    kind = SCHEDULES.get(train.schedule)
    return _shape(kind.code, SCHEDULES.who(kind.name))(done, train, made(kind, train.schedule_parameters))


def cosine(done: float, train: TrainSpec, parameters: None) -> float:
    """Fall along half a cosine to `min_lr_ratio`, which it would reach at step `train.steps`."""
    low = train.min_lr_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float, train: TrainSpec, parameters: None) -> float:
    """Fall in a line to `min_lr_ratio`, which it would reach at step `train.steps`."""
    return 1 - (1 - train.min_lr_ratio) * done


def constant(done: float, train: TrainSpec, parameters: None) -> float:
    """Stay."""
    return 1.0


@cache
def _shape(code: str, who: str) -> Callable[[float, TrainSpec, Any], float]:
    shape: Callable[[float, TrainSpec, Any], float] = load(code, who)
    return shape


def learning_rates(train: TrainSpec, step: int) -> tuple[float, float]:
    """Return (learning rate, router learning rate) of the optimizer step after `step` completed steps."""
    factor = lr_factor(train, step)
    router = train.router_lr if train.router_lr is not None else train.lr * train.router_lr_ratio
    return train.lr * factor, router * factor
