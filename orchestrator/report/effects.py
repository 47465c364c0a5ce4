"""What each factor does on its own, over the cells of one grid or of several: a mixed model with the seed at random.

The model adds the effects of all factors up; what they do together is in its residuals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.report import mixed
from orchestrator.report.collect import CellResult, Results
from orchestrator.report.statistics import LEVEL, Comparison, holm, t_p_value, t_quantile
from orchestrator.report.tables import Entry, Table, difference

GRID = "grid"
MOST_LEVELS = 40


@dataclass(frozen=True, slots=True)
class Effect:
    """What a level of a factor changes against its reference, the other factors kept."""

    factor: str
    level: str
    reference: str
    cells: int


@dataclass(frozen=True, slots=True)
class Effects:
    """The effects of a metric with their intervals, the deviation of seeds and of the rest, and what is aliased."""

    metric: str
    found: Mapping[Effect, Comparison]
    deviation_of_seeds: float
    deviation: float
    cells: int
    aliased: tuple[str, ...]


def effects(several: Sequence[Results], metric: str) -> Effects | None:
    """Return the effects on a metric over all measured cells, each counted once; None where nothing can be said.

    With several grids the grid itself is a factor: what else differs between them goes into it.
    """
    cells: dict[str, tuple[CellResult, str]] = {}
    for results in several:
        for cell in results.cells:
            if metric in cell.metrics:
                cells.setdefault(cell.id, (cell, results.name))
    rows = [{**_levels(cell, several), **({GRID: grid} if len(several) > 1 else {})} for cell, grid in cells.values()]
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if len({row[name] for row in rows}) > 1]
    if not names or len({level for name in names for level in {row[name] for row in rows}}) > MOST_LEVELS:
        return None
    columns, told = [np.ones(len(rows))], []
    for name in names:
        counts = Counter(row[name] for row in rows)
        reference = _reference(name, list(counts), several)
        for level in counts:
            if level != reference:
                columns.append(np.array([float(row[name] == level) for row in rows]))
                told.append(Effect(name, level, reference, counts[level]))
    kept = mixed.independent(columns)
    aliased = [effect for i, effect in enumerate(told, 1) if i not in kept]
    y = np.array([cell.metrics[metric] for cell, _ in cells.values()])
    of_cells = [cell.seed for cell, _ in cells.values()]
    fitted = mixed.fit(y, np.stack([columns[i] for i in kept], 1), of_cells)
    if fitted is None or not fitted.deviation:
        return None
    own = [np.array([float(seed == one) for seed in of_cells]) for one in dict.fromkeys(of_cells)]
    seeds = len(own)
    # A level that only cells of other seeds have is told by the differences of seeds, whose number is small.
    within = {i - seeds for i in mixed.independent([*own, *columns]) if i >= seeds}
    aliased += [told[i - 1] for i in kept if i and i not in within]
    found: dict[Effect, Comparison] = {}
    for place, i in enumerate(kept):
        if i not in within:
            continue
        value = float(fitted.coefficients[place])
        stderr = float(np.sqrt(max(0.0, fitted.covariance[place, place])))
        half = t_quantile(0.5 + LEVEL / 2, fitted.freedom) * stderr
        p = t_p_value(value / stderr, fitted.freedom) if stderr else None
        found[told[i - 1]] = Comparison(value, seeds, 0, value - half, value + half, p, stderr=stderr)
    if not found:
        return None
    corrected = _corrected(found)
    return Effects(
        metric,
        corrected,
        fitted.deviation_of_groups,
        fitted.deviation,
        len(rows),
        tuple(f"{effect.factor}={effect.level}" for effect in aliased),
    )


def table(several: Sequence[Results], metrics: Sequence[str]) -> Table | None:
    """Return the effects on some metrics as a table, None where nothing can be said."""
    every = [one for metric in metrics if (one := effects(several, metric)) is not None]
    if not every:
        return None
    rows = []
    for effect in dict.fromkeys(effect for one in every for effect in one.found):
        labels = (effect.factor, effect.level, effect.reference, str(effect.cells))
        entries: list[Entry] = [difference(one.found.get(effect)) for one in every]
        rows.append((labels, tuple(entries)))
    notes = [
        "what one level changes against another, the other factors kept (an additive mixed model, the seed at random, "
        "REML); 95 % intervals; bold: resolved after Holm's correction over the column; n.r.: not resolved"
    ]
    if any(results.most_seeds for results in several):
        notes.append("the results chose the number of seeds: these intervals take it as fixed")
    for one in every:
        text = f"{one.metric}: {one.cells} cells; deviation of seeds {one.deviation_of_seeds:.4f}, of the rest "
        notes.append(f"{text}{one.deviation:.4f}")
    if aliased := dict.fromkeys(name for one in every for name in one.aliased):
        notes.append(f"not told apart from others, or from the seeds: {', '.join(aliased)}")
    title = f"effects of the factors in {', '.join(results.name for results in several)}"
    return Table(
        title, ("factor", "level", "instead of", "cells"), tuple(e.metric for e in every), tuple(rows), tuple(notes)
    )


def _levels(cell: CellResult, several: Sequence[Results]) -> dict[str, str]:
    """Return factor -> level of a cell; what a grid does not name is read from the cell where it is known."""
    names = dict.fromkeys(name for results in several for name in results.document["factors"] if name != "seed")
    resolved = cell.document.get("resolved", {})
    moe = (resolved.get("model") or {}).get("moe") or {}
    own = {"freeze": (resolved.get("finetune") or {}).get("freeze")}
    if "top_k" in moe and "num_experts" in moe:
        shared = moe.get("shared_experts", 0)
        own["granularity"] = f"{moe['top_k']}/{moe['num_experts']}" + (f"+{shared}" if shared else "")
    found = {}
    for name in names:
        value = cell.factors[name] if name in cell.factors else own.get(name)
        found[name] = "default" if value is None else str(value)
    return found


def _reference(name: str, levels: Sequence[str], several: Sequence[Results]) -> str:
    """Return the level that the others are compared with: a baseline's, else the first."""
    for results in several:
        wanted = str((results.document.get("baseline") or {}).get(name, ""))
        if wanted in levels:
            return wanted
    return "default" if "default" in levels else levels[0]


def _corrected(found: Mapping[Effect, Comparison]) -> dict[Effect, Comparison]:
    tested = [effect for effect, one in found.items() if one.p is not None]
    adjusted = dict(zip(tested, holm([found[effect].p or 0.0 for effect in tested]), strict=True))
    return {effect: replace(one, adjusted=adjusted.get(effect)) for effect, one in found.items()}
