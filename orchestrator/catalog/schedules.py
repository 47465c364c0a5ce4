"""Learning-rate schedules: the factor on the peak rate after the linear warm-up, by name (`pretrain.schedule`).

The code is a pure function `factor(done, train, parameters) -> float`: `done` is the fraction of the steps after the
warm-up that are completed (0 <= done < 1), `train` the phase's TrainSpec (its `steps` are the planned total, so that a
run that is cut or forked has the rates of one that is not), `parameters` the kind's own dataclass, None without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class ScheduleKind:
    """One schedule; `low`: it falls to `min_lr_ratio`, which has no effect under others."""

    name: str
    code: str
    parameters: type | None = None
    low: bool = False
    version: int = 1


BUILTINS: Mapping[str, ScheduleKind] = MappingProxyType(
    {
        name: ScheduleKind(name, f"jobs.train.schedule:{name}", low=name != "constant")
        for name in ("cosine", "linear", "constant")
    }
)
SCHEDULES = Registry("schedules", "schedule", ScheduleKind, BUILTINS)
