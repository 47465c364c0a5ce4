"""The `search:` section: a space of factors that a search samples, and how. Its trials are ordinary cells.

search:
  space:
    router_lr: {loguniform: [1e-6, 1e-3]}
    freeze: {choice: [none, none->router]}
  metric: answer_bpb
  mode: min
  trials: 16
  sampler: random
  scheduler: {name: asha, grace: 0.25, reduction: 3}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from orchestrator.errors import did_you_mean
from orchestrator.files.bounds import bound, raising
from orchestrator.files.problems import Mistake
from orchestrator.grid.axes import AxisReader
from orchestrator.grid.document import Section
from orchestrator.grid.factors import Factor, factor_field
from orchestrator.spec.fields import typed
from orchestrator.spec.rules import NATURAL, POSITIVE, Rule, one_of

LISTS = ("grid", "choice")
RANGES = ("uniform", "loguniform")
KINDS = (*LISTS, *RANGES)


@dataclass(frozen=True, slots=True)
class SearchAxis:
    """One searched factor: each of its values (`grid`), a random one (`choice`), or one in [low, high]."""

    name: str
    kind: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False  # the factor takes whole numbers


@dataclass(frozen=True, slots=True)
class Scheduler:
    """`fifo` runs every trial to its end; `asha` stops the worse ones.

    `grace` is the fraction of its steps that every trial gets; at each rung one in `reduction` goes on.
    """

    name: str = "fifo"
    grace: float = 0.25
    reduction: int = 3


@dataclass(frozen=True, slots=True)
class SearchSpec:
    """What is searched, towards which metric, with how many trials; `seed` makes the samples reproducible."""

    space: tuple[SearchAxis, ...]
    metric: str
    mode: str = "min"
    trials: int = 16
    concurrency: int = 1
    seed: int = 0
    sampler: str = "random"  # random | optuna (learns from the trials before; the package must be installed)
    scheduler: Scheduler = field(default_factory=Scheduler)

    @property
    def fractions(self) -> tuple[float, ...]:
        """The fractions of its steps at which a trial is judged."""
        if self.scheduler.name == "fifo":
            return (1.0,)
        fractions, rung = [], self.scheduler.grace
        while rung < 1.0:
            fractions.append(rung)
            rung *= self.scheduler.reduction
        return (*fractions, 1.0)


_RULES = {
    "mode": one_of("min", "max"),
    "trials": POSITIVE,
    "concurrency": POSITIVE,
    "seed": NATURAL,
    "sampler": one_of("random", "optuna"),
    "name": one_of("fifo", "asha"),
    "grace": Rule(above=0, high=1),
    "reduction": Rule(low=2, high=16),
}
_TYPES = {"metric": str, "mode": str, "sampler": str, "name": str, "grace": float}


def read_search(reader: AxisReader, section: Section, axes: set[str]) -> SearchSpec | None:
    """Return the search of a grid whose `factors` are `axes`, or None and problems."""
    problems = reader.problems
    if not isinstance(section.data, Mapping):
        problems.add("search must be a mapping with space: and metric:", section.place(), "search")
        return None
    before = len(problems.found)
    plain = _scalars(reader, section, (), section.data, ("metric", "mode", "trials", "concurrency", "seed", "sampler"))
    for name in section.data:
        known = tuple(f.name for f in fields(SearchSpec))
        if name not in known:
            hint = did_you_mean(name, known, "keys")
            problems.add(f"search.{name} is unknown", section.place(name), f"search.{name}", hint)
    if "metric" not in section.data:
        problems.add("search.metric is missing", section.place(), "search.metric", "name a column, as in answer_bpb")
    scheduler = section.data.get("scheduler", {})
    scheduler = {"name": scheduler} if isinstance(scheduler, str) else scheduler
    if not isinstance(scheduler, Mapping):
        problems.add("search.scheduler must be fifo, asha or a mapping", section.place("scheduler"), "search.scheduler")
        scheduler = {}
    for name in scheduler:
        if name not in (known := tuple(f.name for f in fields(Scheduler))):
            hint = did_you_mean(name, known, "keys")
            problems.add(f"search.scheduler.{name} is unknown", section.place("scheduler", name), "search", hint)
    settings = _scalars(reader, section, ("scheduler",), scheduler, ("name", "grace", "reduction"))
    space = section.data.get("space")
    if not isinstance(space, Mapping) or not space:
        problems.add("search.space must map factors to distributions", section.place("space"), "search.space")
        space = {}
    found = [_axis(reader, section, str(name), value, axes) for name, value in space.items()]
    if len(problems.found) > before:
        return None
    trials = math.prod(len(axis.values) for axis in found if axis and axis.kind == "grid")
    trials *= plain.get("trials", 1) if any(axis and axis.kind != "grid" for axis in found) else 1
    if trials > (most := bound("MOEGRID_MAX_CELLS")):
        hint = raising("MOEGRID_MAX_CELLS", trials)
        problems.add(f"search has {trials:,} trials, more than {most:,}", section.place("space"), "search.space", hint)
        return None
    return SearchSpec(tuple(axis for axis in found if axis), scheduler=Scheduler(**settings), **plain)


def _scalars(
    reader: AxisReader, section: Section, path: tuple[str, ...], data: Mapping[str, object], names: tuple[str, ...]
) -> dict[str, Any]:
    """Return the typed scalars of `data` that are called `names`."""
    result = {}
    for name in names:
        if name not in data:
            continue
        key = ".".join(("search", *path, name))
        try:
            result[name] = typed(_TYPES.get(name, int), data[name])
            if name in _RULES:
                _RULES[name].check(result[name])
        except Mistake as mistake:
            reader.problems.add(f"{key} {mistake.message}", section.place(*path, name), key, mistake.hint)
    return result


def _axis(reader: AxisReader, section: Section, name: str, value: object, axes: set[str]) -> SearchAxis | None:
    place = section.place("space", name)
    key = f"search.space.{name}"
    factor = reader.factor(name, place)
    if factor is None:
        return None
    if name in axes:
        hint = "a factor is either varied or searched"
        reader.problems.add(f"{key} is already an axis of this grid", place, key, hint)
    if not isinstance(value, Mapping) or len(value) != 1:
        hint = f"write {name}: {{choice: [...]}} or {{loguniform: [low, high]}}"
        reader.problems.add(f"{key} needs one distribution, not {value!r}", place, key, hint)
        return None
    kind, values = next(iter(value.items()))
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS, "distributions")
        reader.problems.add(f"{key}: distribution {kind!r} is unknown", place, key, hint)
        return None
    if not isinstance(values, list) or not values or (kind in RANGES and len(values) != 2):
        what = "[low, high]" if kind in RANGES else "a list of values"
        reader.problems.add(f"{key}.{kind} needs {what}, not {values!r}", place, key)
        return None
    choices = [reader.choice((factor,), [item], section.place("space", name, kind, i)) for i, item in enumerate(values)]
    if None in choices:
        return None
    plain = tuple(choice.values[0][1] for choice in choices if choice)
    if kind in LISTS:
        return SearchAxis(name, kind, plain)
    return _range(reader, factor, kind, plain, place)


def _range(reader: AxisReader, factor: Factor, kind: str, ends: tuple[Any, ...], place: str) -> SearchAxis | None:
    key = f"search.space.{factor.name}"
    if not all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends):
        reader.problems.add(f"{key}: {kind} needs a factor that takes numbers", place, key, "use choice")
        return None
    low, high = float(ends[0]), float(ends[1])
    if not low < high:
        reader.problems.add(f"{key}.{kind}: {ends[0]:g} is not below {ends[1]:g}", place, key, "write [low, high]")
        return None
    if kind == "loguniform" and low <= 0:
        reader.problems.add(f"{key}.loguniform must start above 0, not at {low:g}", place, key)
        return None
    field_ = factor_field(factor)
    return SearchAxis(factor.name, kind, (), low, high, field_ is not None and field_.hint is int)
