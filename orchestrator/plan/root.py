"""The root document of a planned grid: what tracking, reports and retention need to know, without YAML or plan code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.plan.cost import parameters
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.sight import by_component
from orchestrator.spec.cell import Cell
from orchestrator.spec.identity import KIND_VERSIONS, digest, plain
from orchestrator.spec.rules import PHASES
from orchestrator.spec.work import TrainWork

FORMAT = 1
SECTIONS = ("model", "tokenizer", "evaluate", "seed", *PHASES)


def root_digest(graph: StageGraph) -> str:
    """Return the name of a grid version's root document, known before the document is built."""
    grid = graph.grid
    cells = [[item.id, item.name, list(graph.cells[item.id].keys[-1:])] for item in grid.cells]
    outside = [[str(use) for use in uses]] if (uses := graph.uses()) else []
    return digest([FORMAT, KIND_VERSIONS, grid.name, grid.digest, grid.scale, graph.shared, cells, *outside])


def root_document(graph: StageGraph) -> dict[str, Any]:
    """Return the document stored as `grids/<name>/<digest>.json` before a plan reads the store.

    `keys` are all artifacts the grid reaches: the roots of retention. `cells[].resolved` names the entries of
    `sections` that make the cell, so that `explain` can compare two versions of a grid.
    """
    grid = graph.grid
    sections: dict[str, object] = {}
    cells = list(root_cells(graph, sections))
    return {
        "format": FORMAT,
        "name": grid.name,
        "digest": root_digest(graph),
        "description": grid.description,
        "scale": grid.scale,
        "recipe": grid.recipe,
        "grid_digest": grid.digest,
        "shared": graph.shared,
        "seed": grid.seed,
        "factors": list(grid.factors),
        "baseline": plain(grid.baseline),
        "primary": list(grid.primary),
        **({"adaptive": plain(grid.adaptive)} if grid.adaptive else {}),
        **({"plugins": [use.to_json() for use in uses]} if (uses := graph.uses()) else {}),
        "cells": cells,
        "sections": sections,
        "stages": _stages(graph),
        "keys": sorted(graph.stages),
    }


def root_cells(graph: StageGraph, sections: dict[str, object]) -> Iterator[dict[str, Any]]:
    """Yield the entry of each cell; the sections that it names are added to `sections`."""
    named: dict[int, str] = {}
    for item in graph.grid.cells:
        lowered = graph.cells[item.id]
        count = parameters(item.cell.model, item.cell.tokenizer.vocab_size)
        yield {
            "id": item.id,
            "name": item.name,
            "setting": item.setting,
            "factors": plain(item.factors),
            "stages": list(lowered.keys),
            "final": lowered.final,
            "results": [{"key": r.key, "suite": r.suite, "at": r.at, "step": r.step} for r in lowered.results],
            "parameters": {
                "total": count.total,
                "active": count.active,
                **by_component(item.cell.model, count.total),
            },
            "flops_per_token": count.flops_per_token,
            "resolved": _resolved(item.cell, sections, named),
        }


def _resolved(cell: Cell, sections: dict[str, Any], named: dict[int, str]) -> dict[str, str]:
    names = {}
    for name in SECTIONS:
        section = getattr(cell, name)
        if section is None:
            continue
        # A grid builds equal sections once, so the object is enough to recognise them.
        known = named.get(id(section))
        if known is None:
            known = named[id(section)] = digest(section)[:16]
            sections[known] = plain(section)
        names[name] = known
    return names


def _stages(graph: StageGraph) -> dict[str, Any]:
    stages = {}
    for key, stage in graph.stages.items():
        entry: dict[str, object] = {
            "kind": stage.kind,
            "phase": stage.phase,
            "label": stage.label,
            "steps": stage.steps,
            "parents": list(stage.parents),
            "cells": len(graph.users[key]),
        }
        if isinstance(stage.work, TrainWork):
            entry["start"], entry["stop"] = stage.work.start, stage.work.stop
            entry["frozen"] = stage.work.conditions.train.freeze
        if stage.suite:
            read = graph.stages.get(stage.state, stage)
            entry["suite"], entry["state"] = stage.suite, stage.state if read.kind in ("train", "init") else read.state
        stages[key] = entry
    return stages
