"""`moegrid explain` and `diff`: why something is new, and in which fields two cells or grids differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from orchestrator.commands.context import Context, cell_ids, split_cell, take_cell
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE, MoegridError
from orchestrator.grid.diff import Difference, differences
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.moments import continues
from orchestrator.plan.root import root_document
from orchestrator.spec.providers import of_all, uses_of
from orchestrator.store import records


def explain(context: Context) -> int:
    """Say for each cell what is done, what is new, and which field made it new since the version before."""
    cell_name = take_cell(context.arguments)
    graph = context.load_graph()
    document = records.with_sections(root_document(graph))
    known = records.documents(context.store, graph.grid.name) if _known(context, graph.grid.name) else []
    earlier = [d for d in known if d["digest"] != document["digest"] and d["scale"] == document["scale"]]
    plan = context.plan(graph, Journal(context.store))
    wanted = cell_ids(graph, cell_name) if cell_name else [c.id for c in graph.grid.cells]
    back = _going_back(context, graph, {key for key in graph.stages if plan.actions[key].name in ("run", "resume")})
    answers = []
    for cell in (c for c in document["cells"] if c["id"] in wanted):
        pending = [key for key in cell["stages"] if plan.actions[key].name != "done"]
        own = cell["resolved"]
        before, sections = _predecessor(cell, own, earlier)
        changes = [*differences(sections, own), *_edited(graph, cell["stages"], earlier[-1])] if before else []
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
                        "reason": back.get(key) or plan.actions[key].reason,
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
        context.console.tell(f"{context.console.style(answer['name'], 'bold')} ({answer['id']}): {answer['why']}")
        for change in answer["changes"]:
            context.console.tell(f"  {change['field']}: {change['old']} -> {change['new']}")
        if answer["new"]:
            for stage in answer["stages"]:
                reason = f" ({stage['reason']})" if stage["reason"] not in ("", "new") else ""
                same = ", as before" if stage["action"] == "done" and stage["existed_before"] else ""
                context.console.tell(f"  {stage['action']:<8} {stage['key'][:12]}  {stage['label']}{reason}{same}")
    return EXIT_DONE


def _going_back(context: Context, graph: StageGraph, pending: Collection[str]) -> dict[str, str]:
    """Return why pending stages train more than their own steps: the state before was kept without its moments."""
    before = {key: graph.stages[key].parents[0] for key in pending if continues(graph.stages[key])}
    kept = context.store.artifacts.many(before.values())
    return {
        key: "the state before was kept without the optimizer's state: its segment is trained again"
        for key, parent in before.items()
        if parent in kept and not kept[parent].resumable
    }


def diff(context: Context) -> int:
    """Print the fields in which A and B differ, and only those. A and B are GRID or GRID:CELL.

    Of two grids, cells of the same name are compared, and those that only one of them has are named.
    """
    first, second = (_side(context, name) for name in (context.arguments.a, context.arguments.b))
    if ("" in first) != ("" in second):
        raise MoegridError("a cell can only be compared with a cell", hint="give GRID GRID, or GRID:CELL GRID:CELL")
    if not first.keys() & second.keys() and first and second:
        # Grids that share no cell still differ in something: their baselines, or first cells, say in what.
        return _of_baselines(context, first, second)
    changes = [
        {**({"cell": name} if name else {}), "field": field, "a": old, "b": new}
        for name in first
        if name in second
        for field, old, new in differences(first[name], second[name])
    ]
    alone = [
        {"cell": name, "only_in": side}
        for side, own, other in ((context.arguments.a, first, second), (context.arguments.b, second, first))
        for name in own
        if name not in other
    ]
    if context.arguments.json:
        context.emit([*changes, *alone])
        return EXIT_DONE
    for change in changes:
        cell = f"{change['cell']}  " if "cell" in change else ""
        context.console.tell(f"{cell}{change['field']}: {change['a']} -> {change['b']}")
    for lone in alone:
        context.console.tell(f"{lone['cell']}  only in {lone['only_in']}")
    if not changes and not alone:
        context.console.tell("no difference")
    return EXIT_DONE


def _of_baselines(context: Context, first: dict[str, Any], second: dict[str, Any]) -> int:
    """Print the fields in which the first cells of two grids without a common one differ."""
    a, b = next(iter(first)), next(iter(second))
    changes = differences(first[a], second[b])
    if context.arguments.json:
        context.emit([{"cell": f"{a} / {b}", "field": field, "a": old, "b": new} for field, old, new in changes])
        return EXIT_DONE
    context.console.tell(f"no cell is in both; {a!r} of {context.arguments.a}, {b!r} of {context.arguments.b}:")
    for field, old, new in changes:
        context.console.tell(f"  {field}: {old} -> {new}")
    return EXIT_DONE


def _side(context: Context, name: str) -> dict[str, Any]:
    """Return the sections of a grid's cells by name, or those of one cell under no name."""
    grid_name, cell = split_cell(name)
    graph = build_graph(load_grid(grid_name, scale=context.arguments.scale))
    document = records.with_sections(root_document(graph))
    if cell:
        wanted = cell_ids(graph, cell)[0]
        return {"": next(c["resolved"] for c in document["cells"] if c["id"] == wanted)}
    return {c["name"]: c["resolved"] for c in document["cells"]}


def _known(context: Context, name: str) -> bool:
    return any(True for _ in context.store.objects.list(f"grids/{name}"))


def _predecessor(
    cell: Mapping[str, object], own: Mapping[str, object], earlier: list[dict[str, Any]]
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


def _edited(graph: StageGraph, keys: Sequence[str], before: Mapping[str, Any]) -> list[Difference]:
    """Return the plugin files that stages use and that had another content in the version before."""
    old = {told["provider"]: told["version"] for told in before.get("plugins", ()) if told["file"]}
    origins = [use.origin for use in of_all(use for key in keys for use in uses_of(graph.stages[key].work))]
    return [
        (f"plugins.{one.provider}", old[one.provider][:12], one.version[:12])
        for one in origins
        if one.file and old.get(one.provider, one.version) != one.version
    ]


def _why(
    cell: Mapping[str, object], before: Mapping[str, object] | None, changes: list[Any], any_earlier: bool, new: bool
) -> str:
    if before is None:
        return "new: this grid was never run in this store" if new and not any_earlier else "new" if new else "done"
    if not changes:
        return "not finished; nothing changed since it was run before" if new else "done; unchanged"
    count = f"{len(changes)} field{'s' if len(changes) > 1 else ''}"
    if before["name"] == cell["name"]:
        return f"{'new' if new else 'done'}: {count} changed since the version before"
    return f"{'new' if new else 'done'}: {count} away from {before['name']!r} of the version before"
