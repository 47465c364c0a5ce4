"""Schedules: the factor on the peak learning rate after the linear warm-up, by name (`pretrain.schedule`).

The code is a pure function `factor(done, train, parameters) -> float`: `done` is the fraction of the steps after the
warm-up that are completed (0 <= done < 1), `train` the phase's TrainSpec (its `steps` are the planned total, so that a
run that is cut or forked has the rates of one that is not), `parameters` the kind's own dataclass, None without one.

The same schedules move the coefficients of the load-balance and z-losses (`balance.aux_schedule`): without a warm-up,
and `min_lr_ratio` is 0 there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from orchestrator.registry import Registry

Problem = tuple[str, str, str]  # field of the phase, message, hint


class Phase(Protocol):
    """What a schedule may ask of the phase besides its steps."""

    @property
    def warmup_ratio(self) -> float: ...


@dataclass(frozen=True, slots=True)
class ScheduleKind:
    """One schedule.

    `low`: it falls to `min_lr_ratio`, which has no effect under others. `warms`: the warm-up comes before it; else it
    says the whole curve, `done` is the fraction of all steps, and `warmup_ratio` has no effect. `problems(train,
    parameters)` yields what it cannot be combined with.
    """

    name: str
    code: str
    parameters: type | None = None
    low: bool = False
    version: int = 1
    warms: bool = True
    problems: Callable[..., Iterator[Problem]] | None = None


@dataclass(frozen=True, slots=True)
class Wsd:
    """Warm up, stay, decay: the last `decay` of the phase's steps fall to `min_lr_ratio` in one of three shapes."""

    decay: float = 0.1
    shape: str = "linear"

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, a fraction of the steps, not {self.decay:g}")
        if self.shape not in ("linear", "cosine", "1-sqrt"):
            raise ValueError(f"shape must be linear, cosine or 1-sqrt, not {self.shape!r}")


@dataclass(frozen=True, slots=True)
class InverseSqrt:
    """sqrt(timescale / (step + timescale - warm-up steps)); 0 = as many as the warm-up has."""

    timescale: int = 0

    def __post_init__(self) -> None:
        if self.timescale < 0:
            raise ValueError(f"timescale must be steps, 0 for those of the warm-up, not {self.timescale}")


@dataclass(frozen=True, slots=True)
class Points:
    """(fraction of the steps, factor) pairs, joined by lines; level before the first and after the last."""

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0), (1.0, 0.0))

    def __post_init__(self) -> None:
        at = [fraction for fraction, _ in self.points]
        if not at or not all(0 <= fraction <= 1 for fraction in at) or any(a >= b for a, b in itertools.pairwise(at)):
            raise ValueError(f"points must rise from 0 to 1 in their fractions, which are {at}")
        if wrong := [factor for _, factor in self.points if not 0 <= factor < math.inf]:
            raise ValueError(f"points must have factors of at least 0, not {wrong[0]:g}")


def _decay_begins_after_the_warm_up(train: Phase, parameters: Wsd) -> Iterator[Problem]:
    if train.warmup_ratio + parameters.decay > 1 + 1e-9:
        message = f"warmup_ratio {train.warmup_ratio:g} and decay {parameters.decay:g} are more than the whole phase"
        yield "schedule_parameters", message, "lower one of them"


def _needs_a_timescale(train: Phase, parameters: InverseSqrt) -> Iterator[Problem]:
    if not train.warmup_ratio and not parameters.timescale:
        message = "schedule 'inverse_sqrt' has no timescale: there is no warm-up to take it from"
        yield "schedule_parameters", message, "set schedule_parameters.timescale to a number of steps"


_NAMED = (
    *(ScheduleKind(name, f"jobs.train.schedule:{name}", low=True) for name in ("cosine", "linear")),
    ScheduleKind("constant", "jobs.train.schedule:constant"),
    ScheduleKind("wsd", "jobs.train.schedule:wsd", Wsd, low=True, problems=_decay_begins_after_the_warm_up),
    ScheduleKind("inverse_sqrt", "jobs.train.schedule:inverse_sqrt", InverseSqrt, problems=_needs_a_timescale),
    ScheduleKind("points", "jobs.train.schedule:points", Points, warms=False),
)
BUILTINS: Mapping[str, ScheduleKind] = MappingProxyType({kind.name: kind for kind in _NAMED})
SCHEDULES = Registry("schedules", "schedule", ScheduleKind, BUILTINS)
