"""An adaptive number of seeds: which further cells the results so far ask for. Nothing is remembered but the results.

How many seeds a setting has is computed again from the store each time, round by round from the first seeds, so a run
that was killed, and every other command, comes to the same cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.grid.adaptive import Adaptive
from orchestrator.grid.expand import GridCell
from orchestrator.grid.load import Grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.report.statistics import interval_seeds, summary
from orchestrator.store import Store

FEWEST = 3  # an interval over two seeds says nothing: t is 12.7


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeds of one setting: how many it began with, has now, and how wide the interval of those measured is.

    `halfwidth` is None before two seeds were measured.
    """

    setting: str
    began: int
    now: int
    measured: int
    halfwidth: float | None
    most: int
    target: float

    @property
    def state(self) -> str:
        """`waiting` for results, `enough`, or `limit` where `max_seeds` did not suffice."""
        if self.measured < self.now:
            return "waiting"
        narrow = self.halfwidth is not None and self.halfwidth <= self.target
        return "enough" if narrow else "limit"


def grown(grid: Grid, store: Store, *, share: bool = True) -> tuple[Grid, tuple[Seeds, ...]]:
    """Return the grid with the seeds that its results ask for, and what became of every setting.

    Raises MoegridError when a measured cell does not have the metric.
    """
    adaptive = grid.adaptive
    if adaptive is None or not grid.reserve:
        return grid, ()
    began: dict[str, list[GridCell]] = {}
    for item in grid.cells:
        began.setdefault(item.setting, []).append(item)
    waiting = {setting: list(items) for setting, items in began.items()}
    for item in grid.reserve:
        waiting.setdefault(item.setting, []).append(item)
    graph = build_graph(dataclasses.replace(grid, cells=(*grid.cells, *grid.reserve)), share=share)
    values = dict(_values(graph, store, adaptive.metric))
    added: set[str] = set()
    states = []
    for setting, items in waiting.items():
        first, most = len(began.get(setting, ())), min(len(items), adaptive.max_seeds)
        if not first:
            continue
        measured = [values.get(item.id) for item in items]
        now = seeds_asked_for(measured, first, adaptive, most)
        added.update(item.id for item in items[first:now])
        known = [value for value in measured[:now] if value is not None]
        found = summary(known) if len(known) > 1 else None
        half = None if found is None or found.high is None else found.high - found.mean
        states.append(Seeds(setting, first, now, len(known), half, most, adaptive.halfwidth))
    cells = (*grid.cells, *(item for item in grid.reserve if item.id in added))
    return dataclasses.replace(grid, cells=cells), tuple(states)


def seeds_asked_for(values: Sequence[float | None], first: int, adaptive: Adaptive, most: int) -> int:
    """Return how many seeds a setting has, given the values of its seeds in order (None: not measured).

    Each round asks for as many seeds as would do if the deviation stayed as it is, at most twice as many as there are:
    a deviation estimated from few seeds is a rough guess.
    """
    now = first
    while now < most:
        known = [value for value in values[:now] if value is not None]
        if len(known) < now:
            break  # a seed that is not measured, or failed, is waited for: leaving it out would flatter the setting
        wanted = max(FEWEST, interval_seeds(known, adaptive.halfwidth) or most)
        if wanted <= now:
            break
        now = min(wanted, 2 * now, most) if now >= FEWEST else min(FEWEST, most)
    return now


def told(states: Sequence[Seeds], adaptive: Adaptive) -> str:
    """Return one line about the seeds of a grid."""
    text = f"adaptive seeds for {adaptive.metric} within ±{adaptive.halfwidth:g}, at most {adaptive.max_seeds}: "
    counts = {name: sum(s.state == name for s in states) for name in ("enough", "waiting", "limit")}
    words = {
        "enough": "narrow enough",
        "waiting": "waiting for results",
        "limit": f"still wider at {adaptive.max_seeds} seeds",
    }
    text += ", ".join(f"{count} {words[name]}" for name, count in counts.items() if count)
    added = sum(s.now - s.began for s in states)
    room = sum(s.most - s.now for s in states if s.state == "waiting")
    return f"{text}; {added} cells added" + (f", up to {room} more may be" if room else "")


def _values(graph: StageGraph, store: Store, metric: str) -> Iterator[tuple[str, float]]:
    """Yield (cell id, value at the last fraction) of the cells that were measured."""
    last = {key: max((r.at for r in cell.results), default=0.0) for key, cell in graph.cells.items()}
    results = {
        key: [r.key for r in cell.results if r.at == last[key]] for key, cell in graph.cells.items() if cell.results
    }
    manifests = store.index.many({key for keys in results.values() for key in keys})
    for cell, keys in results.items():
        metrics = {name: value for key in keys if key in manifests for name, value in manifests[key].metrics.items()}
        if metric in metrics:
            yield cell, metrics[metric]
        elif manifests.keys() >= set(keys):
            raise MoegridError(
                f"adaptive.metric {metric!r} is no metric of this grid's results",
                cause=f"they have {', '.join(sorted(metrics))}",
                hint=did_you_mean(metric, sorted(metrics), "metrics"),
            )
