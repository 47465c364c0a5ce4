"""Learning rates and the coefficients of losses, as pure functions of the step and the planned total.

So a forked run equals an unforked one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

from orchestrator.catalog.parameters import made
from orchestrator.catalog.schedules import SCHEDULES, InverseSqrt, Points, Wsd
from orchestrator.registry import load
from orchestrator.spec.cell import BalanceSpec, TrainSpec
from orchestrator.spec.schedule import step_at


def warmup_steps(train: TrainSpec) -> int:
    """Return the number of warm-up steps, rounded up; 0 under a schedule that says the whole curve."""
    if not SCHEDULES.get(train.schedule).warms:
        return 0
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


def _step(done: float, train: TrainSpec) -> int:
    """Return the completed steps of the phase that `done` stands for."""
    warm = warmup_steps(train)
    return warm + round(done * max(1, train.steps - warm))


def wsd(done: float, train: TrainSpec, parameters: Wsd) -> float:
    """Stay at the peak, then fall in the last steps: 1 when the decay sets in, `min_lr_ratio` at step `train.steps`.

    Sources: Hu et al. 2024 (MiniCPM) for warm-up, stable, decay; Haegele et al. 2024 for the shape `1-sqrt`.
    """
    # A phase always decays in one step at least.
    begins = min(train.steps - 1, max(warmup_steps(train), train.steps - step_at(parameters.decay, train.steps)))
    fallen = max(0.0, (_step(done, train) - begins) / (train.steps - begins))
    if parameters.shape == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * fallen))
    else:
        left = 1 - (math.sqrt(fallen) if parameters.shape == "1-sqrt" else fallen)
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * left


def inverse_sqrt(done: float, train: TrainSpec, parameters: InverseSqrt) -> float:
    """Fall with one over the square root of the steps; 1 after the warm-up (Vaswani et al. 2017)."""
    warm = warmup_steps(train)
    timescale = parameters.timescale or max(1, warm)
    return math.sqrt(timescale / (_step(done, train) + timescale - warm))


def points(done: float, train: TrainSpec, parameters: Points) -> float:
    """Go from point to point in lines."""
    (first, factor), *_ = given = parameters.points
    if done <= first:
        return factor
    for (left, low), (right, high) in itertools.pairwise(given):
        if done <= right:
            return low + (high - low) * (done - left) / (right - left)
    return given[-1][1]


@cache
def _shape(code: str, who: str) -> Callable[[float, TrainSpec, Any], float]:
    shape: Callable[[float, TrainSpec, Any], float] = load(code, who)
    return shape


def learning_rates(train: TrainSpec, step: int) -> tuple[float, float]:
    """Return (learning rate, router learning rate) of the optimizer step after `step` completed steps."""
    factor = lr_factor(train, step)
    router = train.router_lr if train.router_lr is not None else train.lr * train.router_lr_ratio
    return train.lr * factor, router * factor


def balance_at(train: TrainSpec, step: int) -> BalanceSpec:
    """Return the losses with the coefficients that the optimizer step after `step` completed steps uses.

    A coefficient has no warm-up and falls to 0.
    """
    balance = train.balance
    for name in ("aux", "z"):
        schedule, coefficient = getattr(balance, f"{name}_schedule"), f"{name}_coef"
        if schedule != "constant":
            given = getattr(balance, f"{name}_schedule_parameters")
            of_loss = dataclasses.replace(
                train, schedule=schedule, schedule_parameters=given, warmup_ratio=0.0, min_lr_ratio=0.0
            )
            value = getattr(balance, coefficient) * lr_factor(of_loss, step)
            balance = dataclasses.replace(balance, **{coefficient: value})
    return balance
