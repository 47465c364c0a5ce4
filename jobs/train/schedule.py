"""Learning rate as a pure function of the step and the planned total, so that a forked run equals an unforked one."""

from __future__ import annotations

import math

from orchestrator.spec.cell import TrainSpec


def warmup_steps(train: TrainSpec) -> int:
    """Return the number of warm-up steps, rounded up."""
    return math.ceil(train.warmup_ratio * train.steps - 1e-9)


def lr_factor(train: TrainSpec, step: int) -> float:
    """Return the factor on the peak learning rate that the optimizer step after `step` completed steps uses.

    Warm-up rises linearly and reaches 1 in its last step; after it `cosine` and `linear` fall to `min_lr_ratio`, which
    they would reach at step `train.steps`.
    """
    warm = warmup_steps(train)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, train.steps - warm)
    low = train.min_lr_ratio
    if train.schedule == "cosine":
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    if train.schedule == "linear":
        return 1 - (1 - low) * done
    return 1.0


def learning_rates(train: TrainSpec, step: int) -> tuple[float, float]:
    """Return (learning rate, router learning rate) of the optimizer step after `step` completed steps."""
    factor = lr_factor(train, step)
    router = train.router_lr if train.router_lr is not None else train.lr * train.router_lr_ratio
    return train.lr * factor, router * factor
