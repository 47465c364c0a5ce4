"""An adaptive number of seeds: which further cells the results so far ask for. Nothing is remembered but the results.

Either until the interval of each setting is narrow, or as long as they decide differences (`racing`). The intervals are
those of `sequential`: they hold although the results choose the number of seeds.

How many seeds a setting has is computed again from the store each time, round by round from the first seeds, so a run
that was killed, and every other command, comes to the same cells.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.engine.journal import Journal
from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.grid.adaptive import SEED, Adaptive
from orchestrator.grid.expand import GridCell
from orchestrator.grid.load import Grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.plan import make_plan
from orchestrator.report.baseline import comparable
from orchestrator.report.statistics import interval_seeds, summary
from orchestrator.store import Store

FEWEST = 3  # an interval over two seeds says nothing


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeds of one setting: how many it began with, has now, and how wide the interval of those measured is.

    `halfwidth` is None before two seeds were measured. `state` is `waiting` for results, `enough`, or `limit` where
    `max_seeds` did not suffice; in a race `enough` is a setting whose differences further seeds would hardly decide.
    `failed`: a seed failed for good, and no more are asked for.
    """

    setting: str
    began: int
    now: int
    measured: int
    halfwidth: float | None
    most: int
    state: str


@dataclass(frozen=True, slots=True)
class _Group:
    """The cells of one setting, those that it began with and those in reserve; `factors` without the seed."""

    name: str
    factors: Mapping[str, object]
    cells: tuple[GridCell, ...]
    began: int
    values: Mapping[int, float | None]
    failed: frozenset[int]  # seeds that no run tries again by itself

    def lost(self, now: int) -> bool:
        """Return whether one of the first `now` seeds failed for good."""
        return not self.failed.isdisjoint(list(self.values)[:now])

    def seeds(self, now: int, state: str, most: int) -> Seeds:
        known = [value for value in list(self.values.values())[:now] if value is not None]
        found = summary(known, most) if len(known) > 1 else None
        half = None if found is None or found.high is None else found.high - found.mean
        return Seeds(self.name, self.began, now, len(known), half, most, state)


def grown(grid: Grid, store: Store, *, share: bool = True) -> tuple[Grid, tuple[Seeds, ...]]:
    """Return the grid with the seeds that its results ask for, and what became of every setting.

    Raises MoegridError when a measured cell does not have the metric.
    """
    adaptive = grid.adaptive
    if adaptive is None or not grid.reserve:
        return grid, ()
    groups = _groups(grid, store, adaptive, share=share)
    states = _raced(grid, groups, adaptive) if adaptive.race else _narrowed(groups, adaptive)
    added = {item.id for group, found in zip(groups, states, strict=True) for item in group.cells[: found.now]}
    cells = (*grid.cells, *(item for item in grid.reserve if item.id in added))
    return dataclasses.replace(grid, cells=cells), states


def expected_cells(grid: Grid, store: Store, *, share: bool = True) -> float | None:
    """Return the cells that a grid may be expected to end with, None where nothing is known of its deviations yet."""
    adaptive = grid.adaptive
    if adaptive is None or not grid.reserve:
        return float(len(grid.cells))
    groups = _groups(grid, store, adaptive, share=share)
    left = len(grid.cells) - sum(group.began for group in groups)
    if adaptive.race:
        from orchestrator.report.racing import TOLERANCES, expected

        pairs, tolerance = _pairs(grid, groups, adaptive), TOLERANCES[adaptive.race]
        failed = _failed_seeds(groups)
        return left + expected(_by_name(groups), _began(groups), adaptive.max_seeds, pairs, tolerance, failed)
    total = float(left)
    for group in groups:
        most = min(len(group.cells), adaptive.max_seeds)
        known = [value for value in group.values.values() if value is not None]
        now = seeds_asked_for(list(group.values.values()), group.began, adaptive, most)
        if group.lost(now):
            total += now
            continue
        if len(known) < 2:
            return None
        total += max(group.began, interval_seeds(known, adaptive.halfwidth or 0.0, most) or most)
    return total


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
        wanted = max(FEWEST, interval_seeds(known, adaptive.halfwidth or 0.0, most) or most)
        if wanted <= now:
            break
        now = min(wanted, 2 * now, most) if now >= FEWEST else min(FEWEST, most)
    return now


def told(states: Sequence[Seeds], adaptive: Adaptive) -> str:
    """Return one line about the seeds of a grid."""
    aim = f"that decide {adaptive.metric} ({adaptive.race})" if adaptive.race else f"for {adaptive.metric}"
    aim += "" if adaptive.race else f" within ±{adaptive.halfwidth:g}"
    text = f"adaptive seeds {aim}, at most {adaptive.max_seeds}: "
    counts = {name: sum(s.state == name for s in states) for name in ("enough", "waiting", "limit", "failed")}
    words = {
        "enough": "stopped" if adaptive.race else "narrow enough",
        "waiting": "waiting for results",
        "limit": f"{'at' if adaptive.race else 'still wider at'} {adaptive.max_seeds} seeds",
        "failed": f"{'left the race' if adaptive.race else 'got no more'}: a seed failed",
    }
    text += ", ".join(f"{count} {words[name]}" for name, count in counts.items() if count)
    added = sum(s.now - s.began for s in states)
    room = sum(s.most - s.now for s in states if s.state == "waiting")
    return f"{text}; {added} cells added" + (f", up to {room} more may be" if room else "")


def _groups(grid: Grid, store: Store, adaptive: Adaptive, *, share: bool) -> tuple[_Group, ...]:
    """Return the settings that begin with some cell, with the values that the store has of them."""
    began: dict[str, list[GridCell]] = {}
    for item in grid.cells:
        began.setdefault(item.setting, []).append(item)
    whole = {setting: list(items) for setting, items in began.items()}
    for item in grid.reserve:
        if item.setting in whole:
            whole[item.setting].append(item)
    graph = build_graph(dataclasses.replace(grid, cells=(*grid.cells, *grid.reserve)), share=share)
    values = dict(_values(graph, store, adaptive.metric))
    failed = _failed_cells(
        graph, store, [item.id for items in whole.values() for item in items if item.id not in values]
    )
    return tuple(
        _Group(
            name,
            {factor: value for factor, value in items[0].factors.items() if factor != SEED},
            tuple(items),
            len(began[name]),
            {item.factors[SEED]: values.get(item.id) for item in items},
            frozenset(item.factors[SEED] for item in items if item.id in failed),
        )
        for name, items in whole.items()
    )


def _narrowed(groups: Sequence[_Group], adaptive: Adaptive) -> tuple[Seeds, ...]:
    """Return the seeds with which the interval of each setting is narrow enough."""
    found = []
    for group in groups:
        most = min(len(group.cells), adaptive.max_seeds)
        values = list(group.values.values())
        now = seeds_asked_for(values, group.began, adaptive, most)
        seeds = group.seeds(now, "", most)
        narrow = seeds.halfwidth is not None and seeds.halfwidth <= (adaptive.halfwidth or 0.0)
        state = "waiting" if seeds.measured < now else "enough" if narrow else "limit"
        state = "failed" if group.lost(now) else state
        found.append(dataclasses.replace(seeds, state=state))
    return tuple(found)


def _raced(grid: Grid, groups: Sequence[_Group], adaptive: Adaptive) -> tuple[Seeds, ...]:
    """Return the seeds that the race gives to each setting."""
    from orchestrator.report.racing import TOLERANCES, race

    pairs = _pairs(grid, groups, adaptive)
    tolerance, failed = TOLERANCES[adaptive.race], _failed_seeds(groups)
    lanes = race(_by_name(groups), _began(groups), adaptive.max_seeds, pairs, tolerance, failed)
    states = {"decided": "enough"}
    return tuple(
        group.seeds(lane.seeds, states.get(lane.state, lane.state), min(len(group.cells), adaptive.max_seeds))
        for group, lane in ((group, lanes[group.name]) for group in groups)
    )


def _pairs(grid: Grid, groups: Sequence[_Group], adaptive: Adaptive) -> list[tuple[str, str]]:
    """Return the pairs of settings whose differences the race decides."""
    if adaptive.race == "pairs":
        return [(a.name, b.name) for a, b in itertools.combinations(groups, 2)]
    found = ((group, comparable(group, groups, grid.baseline)[0]) for group in groups)
    return [(group.name, other.name) for group, other in found if other is not None]


def _by_name(groups: Sequence[_Group]) -> dict[str, Mapping[int, float | None]]:
    return {group.name: group.values for group in groups}


def _began(groups: Sequence[_Group]) -> dict[str, int]:
    return {group.name: group.began for group in groups}


def _failed_seeds(groups: Sequence[_Group]) -> dict[str, frozenset[int]]:
    return {group.name: group.failed for group in groups}


def _failed_cells(graph: StageGraph, store: Store, unmeasured: Sequence[str]) -> set[str]:
    """Return which of these cells get no further result: what they lack failed for good, or needs what did."""
    present = store.artifacts.keys()
    failed = Journal(store).given_up(graph.stages.keys() - present) if unmeasured else {}
    if not failed:
        return set()
    blocked = set(make_plan(graph, present, failed=failed).keys("blocked"))
    lacking = {cell: [r.key for r in graph.cells[cell].results if r.key not in present] for cell in unmeasured}
    return {cell for cell, keys in lacking.items() if keys and blocked.issuperset(keys)}


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
