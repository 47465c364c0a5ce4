"""Freeze schedules and fractions of a run, as whole optimizer steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

from orchestrator.catalog.freezing import NONE, canonical


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps [start, stop) in which what one freeze rule names ("" = nothing) is frozen."""

    frozen: str
    start: int
    stop: int


def step_at(fraction: float, steps: int) -> int:
    """Return the whole step at `fraction` of `steps`, half rounded up."""
    return math.floor(fraction * steps + 0.5)


@cache
def parse_freeze(schedule: str) -> tuple[tuple[str, float], ...]:
    """Return ((word, start fraction), ...) of a schedule such as `none->router` or `none@0->router@0.5->expert@0.75`.

    A word has one text for what it freezes. Phases without `@` share the run evenly. Raises ValueError with the reason.
    """
    parts = [part.strip() for part in schedule.split("->")]
    names, starts = [], []
    for i, part in enumerate(parts):
        name, at, fraction = (text.strip() for text in part.partition("@"))
        if name != NONE:
            try:
                name = canonical(name)
            except ValueError as error:
                raise ValueError(f"freeze schedule {schedule!r}: {error}") from None
        if at:
            try:
                start = float(fraction)
            except ValueError:
                raise ValueError(f"freeze schedule {schedule!r}: {fraction!r} is not a fraction") from None
        elif any("@" in p for p in parts):
            raise ValueError(f"freeze schedule {schedule!r}: give every phase a start (@fraction) or none of them")
        else:
            start = i / len(parts)
        names.append(name)
        starts.append(start)
    if starts[0] != 0 or any(not a < b for a, b in itertools.pairwise(starts)) or starts[-1] >= 1:
        raise ValueError(f"freeze schedule {schedule!r}: starts must rise from 0 and stay below 1")
    return tuple(zip(names, starts, strict=True))


def freeze_phases(schedule: str, steps: int) -> tuple[Phase, ...]:
    """Return the phases of `schedule` over `steps` steps; equal neighbours are one phase, empty ones are dropped."""
    parsed = parse_freeze(schedule)
    bounds = [step_at(start, steps) for _, start in parsed] + [steps]
    phases: list[Phase] = []
    for (name, _), start, stop in zip(parsed, bounds[:-1], bounds[1:], strict=True):
        frozen = "" if name == NONE else name
        if start == stop:
            continue
        if phases and phases[-1].frozen == frozen:
            phases[-1] = Phase(frozen, phases[-1].start, stop)
        else:
            phases.append(Phase(frozen, start, stop))
    return tuple(phases)
