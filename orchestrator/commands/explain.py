"""`moegrid explain` and `diff`: why something is new, and in which fields two cells or grids differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.commands.context import Context, cell_ids
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE, MoegridError
from orchestrator.plan.graph import build_graph
from orchestrator.plan.root import root_document
from orchestrator.spec.diff import differences
from orchestrator.spec.grid import load_grid
from orchestrator.tracking import records


def explain(context: Context) -> int:
    """Say for each cell what is done, what is new, and which field made it new since the version before."""
    graph = context.load_graph()
    document = records.with_sections(root_document(graph))
    known = records.documents(context.store, graph.grid.name) if _known(context, graph.grid.name) else []
    earlier = [d for d in known if d["digest"] != document["digest"] and d["scale"] == document["scale"]]
    context.write_root(graph)
    plan = context.plan(graph, Journal(context.store))
    wanted = cell_ids(graph, context.arguments.cell) if context.arguments.cell else [c.id for c in graph.grid.cells]
    answers = []
    for cell in (c for c in document["cells"] if c["id"] in wanted):
        pending = [key for key in cell["stages"] if plan.actions[key].name != "done"]
        own = cell["resolved"]
        before, sections = _predecessor(cell, own, earlier)
        changes = differences(sections, own) if before else []
        answers.append(
            {
                "id": cell["id"],
                "name": cell["name"],
                "new": bool(pending),
                "why": _why(cell, before, changes, bool(earlier), bool(pending)),
                "changes": [{"field": field, "old": old, "new": new} for field, old, new in changes],
                "stages": [
                    {
                        "key": key,
                        "label": graph.stages[key].label,
                        "action": plan.actions[key].name,
                        "reason": plan.actions[key].reason,
                        "existed_before": any(key in d["keys"] for d in earlier),
                    }
                    for key in cell["stages"]
                ],
            }
        )
    if context.arguments.json:
        context.emit({"grid": graph.grid.name, "cells": answers})
        return EXIT_DONE
    for answer in answers:
        context.console.print(f"{context.console.style(answer['name'], 'bold')} ({answer['id']}): {answer['why']}")
        for change in answer["changes"]:
            context.console.print(f"  {change['field']}: {change['old']} -> {change['new']}")
        if answer["new"]:
            for stage in answer["stages"]:
                reason = f" ({stage['reason']})" if stage["reason"] not in ("", "new") else ""
                same = ", as before" if stage["action"] == "done" and stage["existed_before"] else ""
                context.console.print(f"  {stage['action']:<8} {stage['key'][:12]}  {stage['label']}{reason}{same}")
    return EXIT_DONE


def diff(context: Context) -> int:
    """Print the fields in which A and B differ, and only those. A and B are GRID or GRID:CELL."""
    first, second = (_side(context, name) for name in (context.arguments.a, context.arguments.b))
    if isinstance(first, str) or isinstance(second, str):
        raise MoegridError("a cell can only be compared with a cell", hint="give GRID GRID, or GRID:CELL GRID:CELL")
    changes = differences(first, second)
    if context.arguments.json:
        context.emit([{"field": field, "a": old, "b": new} for field, old, new in changes])
        return EXIT_DONE
    for field, old, new in changes:
        context.console.print(f"{field}: {old} -> {new}")
    if not changes:
        context.console.print("no difference")
    return EXIT_DONE


def _side(context: Context, name: str) -> Any:
    grid_name, _, cell = name.partition(":")
    grid = load_grid(grid_name, scale=context.arguments.scale)
    graph = build_graph(grid)
    document = records.with_sections(root_document(graph))
    cells = {c["id"]: c for c in document["cells"]}
    if cell:
        return cells[cell_ids(graph, cell)[0]]["resolved"]
    return {c["name"]: c["resolved"] for c in document["cells"]}


def _known(context: Context, name: str) -> bool:
    return any(True for _ in context.store.objects.list(f"grids/{name}"))


def _predecessor(
    cell: Mapping[str, Any], own: Mapping[str, Any], earlier: list[dict[str, Any]]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the most similar cell of the newest earlier version and its sections: equal, or of the same name, or of
    the fewest changes.
    """
    if not earlier or not earlier[-1]["cells"]:
        return None, {}
    document = earlier[-1]
    for same in ("id", "name"):
        for other in document["cells"]:
            if other[same] == cell[same]:
                return other, other["resolved"]
    found = min(document["cells"], key=lambda other: len(differences(other["resolved"], own)))
    return found, found["resolved"]


def _why(
    cell: Mapping[str, Any], before: Mapping[str, Any] | None, changes: list[Any], any_earlier: bool, new: bool
) -> str:
    if before is None:
        return "new: this grid was never planned before" if new and not any_earlier else "new" if new else "done"
    if not changes:
        return "not finished; nothing changed since it was planned before" if new else "done; unchanged"
    count = f"{len(changes)} field{'s' if len(changes) > 1 else ''}"
    if before["name"] == cell["name"]:
        return f"{'new' if new else 'done'}: {count} changed since the version before"
    return f"{'new' if new else 'done'}: {count} away from {before['name']!r} of the version before"
