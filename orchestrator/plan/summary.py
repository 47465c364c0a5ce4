"""A plan as tables: its phases, the blocks of the grid, its models; and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from orchestrator.grid.idle import idle_words
from orchestrator.plan.cost import flops, parameters, tokens_of
from orchestrator.plan.needs import gates, missing_benchmarks, packages
from orchestrator.plan.plan import ACTIONS, STAGE_PHASES, Plan
from orchestrator.plan.stored import KINDS, stored
from orchestrator.spec.cell import Resources
from orchestrator.spec.providers import of_all, of_driver


def phases(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per phase: stages and steps with and without sharing, and the actions."""
    shared, unshared = plan.graph.sharing(), plan.graph.unshared()
    counts: dict[str, Counter[str]] = {phase: Counter() for phase in STAGE_PHASES}
    alike: dict[tuple[int, ...], list[Any]] = {}
    for stage in plan.graph.stages.values():
        counts[stage.phase][plan.actions[stage.key].name] += 1
        tokenizer = plan.graph.cell(plan.graph.users[stage.key][0]).cell.tokenizer
        known = alike.setdefault((*map(id, stage.alike), id(tokenizer)), [stage, 0])
        known[1] += 1
    totals, written = dict.fromkeys(STAGE_PHASES, 0.0), stored(plan)
    for stage, count in alike.values():
        totals[stage.phase] += count * flops(stage, plan.vocabulary(stage))
    return [
        {
            "phase": phase,
            "stages": {"shared": shared[phase][0], "unshared": unshared[phase][0]},
            "steps": {"shared": shared[phase][1], "unshared": unshared[phase][1]},
            "flops": totals[phase],
            "store_bytes": {kind: written[phase][kind] for kind in KINDS},
            "actions": {name: counts[phase].get(name, 0) for name in ACTIONS},
        }
        for phase in STAGE_PHASES
        if phase in shared
    ]


def groups(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per block of the grid (cells that set the same factors) with its training segments.

    Segments are counted for the last training phase, where the cells of a block differ, with and without sharing.
    """
    blocks: dict[tuple[str, ...], list[str]] = {}
    for item in plan.graph.grid.cells:
        blocks.setdefault(tuple(item.factors), []).append(item.id)
    rows = []
    for factors, ids in blocks.items():
        segments = []
        for cell_id in ids:
            stages = plan.graph.cells[cell_id].stages
            last = next((s.phase for s in reversed(stages) if s.kind == "train"), "")
            segments.append([s.key for s in stages if s.kind == "train" and s.phase == last])
        keys = {key for cell in segments for key in cell}
        seeds = len({_seeds(plan, cell_id) for cell_id in ids})
        sample = plan.graph.cell(ids[0]).cell
        count = parameters(sample.model, sample.tokenizer.vocab_size)
        rows.append(
            {
                "factors": list(factors),
                "cells": len(ids),
                "seeds": seeds,
                "segments": {"shared": len(keys), "unshared": sum(map(len, segments))},
                "actions": dict(Counter(plan.actions[key].name for key in keys)),
                "reason": _reason(plan, keys),
                "parameters": {"total": count.total, "active": count.active},
                "flops_per_token": count.flops_per_token,
            }
        )
    return rows


def _seeds(plan: Plan, cell_id: str) -> tuple[Any, ...]:
    seed = plan.graph.cell(cell_id).cell.seed
    return (seed.data, seed.init, seed.pretrain, seed.finetune, seed.eval)


def _reason(plan: Plan, keys: Collection[str]) -> str:
    reasons = Counter(plan.actions[key].reason for key in keys if plan.actions[key].reason)
    return "; ".join(reason for reason, _ in reasons.most_common(3))


def models(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per shape: total and active parameters, forward FLOPs a token, training tokens, cells."""
    rows: dict[Any, dict[str, Any]] = {}
    known: dict[tuple[int, ...], dict[str, Any]] = {}  # by the sections that make a row: a grid builds each once
    for item in plan.graph.grid.cells:
        model = item.cell.model
        identity = tuple(map(id, (model, item.cell.tokenizer, *item.cell.phases.values())))
        if identity in known:
            known[identity]["cells"] += 1
            continue
        count = parameters(model, item.cell.tokenizer.vocab_size)
        row = {
            "backbone": model.backbone,
            "preset": model.moe.preset,
            "experts": f"{model.moe.top_k}/{model.moe.num_experts}+{model.moe.shared_experts}",
            "total": count.total,
            "active": count.active,
            "flops_per_token": count.flops_per_token,
            "tokens": {phase: tokens_of(train) for phase, train in item.cell.phases.items()},
        }
        known[identity] = rows.setdefault(repr(row), {**row, "cells": 0})
        known[identity]["cells"] += 1
    return list(rows.values())


def meshes(plan: Plan) -> list[dict[str, str | int]]:
    """Return how ranks of training phases are laid out where that is asked for: phase, ranks and mesh, each once."""
    found: dict[tuple[str, int, str], None] = {}
    for item in plan.graph.grid.cells:
        execution = item.cell.execution
        for phase in item.cell.phases:
            asked = execution.resources.get(phase, Resources())
            ranks = asked.nodes * asked.processes
            if mesh := execution.parallel.name(ranks):
                found[phase, ranks, mesh] = None
    return [{"phase": phase, "ranks": ranks, "mesh": mesh} for phase, ranks, mesh in found]


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON types (the contract of `moegrid plan --json`)."""
    grid = plan.graph.grid
    rows = phases(plan)
    return {
        "grid": grid.name,
        "scale": grid.scale,
        "cells": len(grid.cells),
        "stages": _sum(rows, "stages"),
        "train_steps": _sum(rows, "steps"),
        "actions": plan.counts(),
        "gpu_hours": round(plan.hours(gpu=True), 3),
        "core_hours": round(plan.hours(gpu=False), 3),
        "gpu_hours_of_grid": {
            "shared": round(plan.hours_of_grid(gpu=True, shared=True), 3),
            "unshared": round(plan.hours_of_grid(gpu=True, shared=False), 3),
        },
        "store_bytes": {kind: sum(row["store_bytes"][kind] for row in rows) for kind in KINDS},
        "phases": rows,
        "groups": groups(plan),
        "models": models(plan),
        "meshes": meshes(plan),
        "plugins": [{**use.to_json(), "shown": str(use)} for use in of_all((*plan.graph.uses(), *of_driver()))],
        "packages": [{"url": one.url, "licence": one.licence, "megabytes": one.megabytes} for one in packages(plan)],
        "gated": [{"name": gate.name, "stages": gate.stages, "hint": gate.hint} for gate in gates(plan)],
        "left_out": [
            {"suite": left.suite, "tasks": list(left.tasks), "hint": left.hint} for left in missing_benchmarks(grid)
        ],
        "idle": [
            {
                "field": f"model.moe.{one.field}",
                "cells": one.cells,
                "same": [list(pair) for pair in one.same],
                "told": str(one),
            }
            for one in idle_words(grid.cells)
        ],
        "blocked": [
            {"stage": key, "label": plan.graph.stages[key].label, "reason": plan.actions[key].reason}
            for key in plan.keys("blocked")
        ],
    }


def _sum(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, int]:
    counts = [row[name] for row in rows]
    return {sharing: sum(count[sharing] for count in counts) for sharing in ("shared", "unshared")}
