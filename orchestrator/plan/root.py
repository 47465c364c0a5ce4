"""The root document of a planned grid: what tracking, reports and retention need to know, without YAML or plan code."""

from __future__ import annotations

from typing import Any

from orchestrator.plan.cost import parameters
from orchestrator.plan.graph import StageGraph
from orchestrator.spec.identity import digest, plain
from orchestrator.spec.work import EvaluateWork, TrainWork


def root_document(graph: StageGraph) -> dict[str, Any]:
    """Return the document stored as `grids/<name>/<digest>.json` before a plan reads the store.

    `keys` are all artifacts the grid reaches: the roots of retention. `cells[].resolved` lets `explain` compare two
    versions of a grid.
    """
    grid = graph.grid
    cells = []
    for item in grid.cells:
        lowered = graph.cells[item.id]
        model = item.cell.model
        count = parameters(model, item.cell.tokenizer.vocab_size)
        cells.append(
            {
                "id": item.id,
                "name": item.name,
                "setting": item.setting,
                "factors": plain(item.factors),
                "stages": list(lowered.keys),
                "final": lowered.final,
                "results": [{"key": r.key, "suite": r.suite, "at": r.at, "step": r.step} for r in lowered.results],
                "parameters": {"total": count.total, "active": count.active},
                "flops_per_token": count.flops_per_token,
                "resolved": {k: v for k, v in plain(item.cell).items() if k != "execution"},
            }
        )
    stages = {}
    for key, stage in graph.stages.items():
        entry: dict[str, Any] = {
            "kind": stage.kind,
            "phase": stage.phase,
            "label": stage.label,
            "steps": stage.steps,
            "parents": list(stage.parents),
            "cells": list(graph.users[key]),
        }
        if isinstance(stage.work, TrainWork):
            entry["start"], entry["stop"] = stage.work.start, stage.work.stop
            entry["frozen"] = stage.work.conditions.train.freeze
        if isinstance(stage.work, EvaluateWork):
            entry["suite"], entry["state"] = stage.work.suite, stage.work.state
        stages[key] = entry
    document = {
        "format": 1,
        "name": grid.name,
        "description": grid.description,
        "scale": grid.scale,
        "recipe": grid.recipe,
        "grid_digest": grid.digest,
        "shared": graph.shared,
        "seed": grid.seed,
        "factors": list(grid.factors),
        "baseline": plain(grid.baseline),
        "primary": list(grid.primary),
        "cells": cells,
        "stages": stages,
        "keys": sorted(graph.stages),
    }
    return {**document, "digest": digest(document)}
